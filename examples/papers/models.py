"""Models of the papers beside LeNet-5, which the demo has."""

from collections import OrderedDict

from torch import nn


def make_lenet() -> nn.Sequential:
    """Make the LeNet of LIMIT, as in TensorFlow's official models: 3,274,634 parameters.

    Images of shape (n, 1, 28, 28), 10 classes.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(3136, 1024),
            relu3=nn.ReLU(),
            dropout=nn.Dropout(0.4),
            dense2=nn.Linear(1024, 10),
        )
    )
