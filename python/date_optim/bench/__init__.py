"""``python -m date_optim.bench``: times steps beside what one would use instead.

Nothing here is imported with ``date_optim``. Tables and plots need ``pip install
"date-kernels[bench]"``; the clocks, shapes and bytes do not.
"""
