"""LeNet-5 (LeCun et al. 1998) as it is written today, with rectifiers and max pooling."""

from collections import OrderedDict

from torch import nn


def make_lenet5() -> nn.Sequential:
    """Make LeNet-5 for images of shape (n, 1, 28, 28) and 10 classes: 61,706 parameters.

    The first convolution pads the images to the 32x32 pixels of the paper.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(400, 120),
            relu3=nn.ReLU(),
            dense2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            dense3=nn.Linear(84, 10),
        )
    )
