"""The optimizers here under names of timm's registry, for ``timm.optim.create_optimizer_v2``."""

from __future__ import annotations

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry  # timm has no other way in

from ..optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, RMSprop
from ..presets import DATE, LAMB, LARS

# timm takes the part of a name after its last underscore, so these have none. The flags say which
# of timm's arguments a class takes: eps and betas are dropped where it does not, and momentum,
# which timm always has, is passed on where it does.
_OPTIMIZERS = (
    OptimInfo("datesgd", SGD, "Layer-wise SGD", has_eps=False, has_momentum=True),
    OptimInfo("datermsprop", RMSprop, "Layer-wise RMSprop", has_momentum=True),
    OptimInfo("dateadagrad", Adagrad, "Layer-wise AdaGrad"),
    OptimInfo("dateadam", Adam, "Layer-wise Adam", has_betas=True),
    OptimInfo("dateadamw", AdamW, "Layer-wise AdamW", has_betas=True),
    OptimInfo("dateadadelta", Adadelta, "Layer-wise Adadelta"),
    OptimInfo("datelion", Lion, "Layer-wise Lion", has_eps=False, has_betas=True),
    OptimInfo("datelars", LARS, "LARS", has_eps=False, has_momentum=True),
    OptimInfo("datelamb", LAMB, "LAMB", has_betas=True),
    # Its rule decides what it takes. Without the flag timm's momentum does not reach it.
    OptimInfo("date", DATE, "DATE: rule= and its bounded trust ratio", has_betas=True),
)


def register() -> None:
    """Add the optimizers here to timm's registry; once is enough, more often does nothing.

    ``datesgd``, ``datermsprop``, ``dateadagrad``, ``dateadam``, ``dateadamw``, ``dateadadelta``,
    ``datelion``, ``datelars`` and ``datelamb`` are the classes; ``date`` is `date_optim.DATE`.

    Notes
    -----
    timm's own arguments (``lr``, ``weight_decay``, ``momentum``, ``eps``, ``betas``, ``foreach``)
    arrive as with its own optimizers: momentum is 0.9 unless said otherwise, and what a class does
    not take is dropped. All others go to the class: ``trust=``, ``upper=``, ``nesterov=``. With
    ``date`` momentum is that of its rule, and betas are refused by a rule without them.

    Examples
    --------
    >>> import timm, torch
    >>> register()
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = timm.optim.create_optimizer_v2(model, "datelamb", lr=0.01, weight_decay=0.02)
    >>> type(optimizer).__name__
    'LAMB'
    """
    known = default_registry.list_optimizers()
    for info in _OPTIMIZERS:
        if info.name not in known or default_registry.get_optimizer_info(info.name) != info:
            default_registry.register(info)
