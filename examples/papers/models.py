"""Models of the papers beside LeNet-5, which the demo has."""

from collections import OrderedDict

from torch import Tensor, nn


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


class ImageLstm(nn.Module):
    """LEGW's LSTM for MNIST: an image's 28 rows, one after the other; 137,098 parameters.

    A row is mapped to 128 values, the LSTM has 128 units, and its last output is classified. It is
    the papers' model but for the second bias vector that torch's LSTM has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(28, 128)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.classes = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images of shape (n, 1, 28, 28); return logits of shape (n, 10)."""
        outputs, _ = self.lstm(self.rows(images[:, 0]))
        logits: Tensor = self.classes(outputs[:, -1])
        return logits
