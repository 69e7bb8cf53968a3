"""Before any of the tools is imported."""

from integrations.recipes import declare_operators_of_torchvision

declare_operators_of_torchvision()
