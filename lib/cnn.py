"""
The frozen visual backbones, run by data.py alone: (F, 3, height, width) -> (F, width of a feature), eq. 1.

GoogLeNet as torchvision ships it: https://github.com/pytorch/vision/blob/main/torchvision/models/googlenet.py
"""
import importlib
import importlib.util
import sys
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.program import BadInput, print0
from lib.tensors import check_names, init_weight, load_tensors, shapes_of

# ---------------------------------------------------------------------------------------------------------------------
# The networks

class RandomCNN(nn.Module):
    """The toy's backbone: three random convolutions, never trained, pooled to a 4x4 grid of 64 channels."""

    def __init__(self, seed=0):
        super().__init__()
        channels = ((3, 32), (32, 64), (64, 64))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 5, stride=2, padding=2) for i, o in channels)
        he_init(self, seed).requires_grad_(False)

    def features(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return F.adaptive_avg_pool2d(x, 4).flatten(1)  # (F, 64, h, w) -> (F, 64, 4, 4) -> (F, 1024)


class ConvBN(nn.Sequential):
    """A convolution, normalised over the batch that it was trained with, and ReLU."""

    def __init__(self, i, o, kernel, stride=1):
        super().__init__(OrderedDict(conv=nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False),
                                     bn=nn.BatchNorm2d(o, eps=0.001), relu=nn.ReLU()))


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3, "5x5" (3x3 in torchvision's weights) and a pooled one, on channels."""

    def __init__(self, i, c1, c3_in, c3, c5_in, c5, pool):
        super().__init__()
        self.branch1 = ConvBN(i, c1, 1)
        self.branch2 = nn.Sequential(ConvBN(i, c3_in, 1), ConvBN(c3_in, c3, 3))
        self.branch3 = nn.Sequential(ConvBN(i, c5_in, 1), ConvBN(c5_in, c5, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvBN(i, pool, 1))

    def forward(self, x):  # (F, i, h, w) -> (F, c1 + c3 + c5 + pool, h, w)
        return torch.cat([branch(x) for branch in self.children()], 1)


class GoogLeNet(nn.Sequential):
    """
    Inception-v1, the paper's 1024-d CNN. Always in eval mode.
    No transform inside: extract.Extractor normalises with mean 0.5, deviation 0.5.
    """

    def __init__(self):
        pool = lambda kernel: nn.MaxPool2d(kernel, 2, ceil_mode=True)
        super().__init__(OrderedDict(
            conv1=ConvBN(3, 64, 7, 2),
            maxpool1=pool(3),
            conv2=ConvBN(64, 64, 1),
            conv3=ConvBN(64, 192, 3),
            maxpool2=pool(3),
            inception3a=Inception(192, 64, 96, 128, 16, 32, 32),
            inception3b=Inception(256, 128, 128, 192, 32, 96, 64),
            maxpool3=pool(3),
            inception4a=Inception(480, 192, 96, 208, 16, 48, 64),
            inception4b=Inception(512, 160, 112, 224, 24, 64, 64),
            inception4c=Inception(512, 128, 128, 256, 24, 64, 64),
            inception4d=Inception(512, 112, 144, 288, 32, 64, 64),
            inception4e=Inception(528, 256, 160, 320, 32, 128, 128),
            maxpool4=pool(2),
            inception5a=Inception(832, 256, 160, 320, 32, 128, 128),
            inception5b=Inception(832, 384, 192, 384, 48, 128, 128)))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # BatchNorm must never see a batch: a frame's feature cannot depend on others

    def features(self, x):
        return self(x).mean((2, 3))  # (F, 1024, 7, 7) -> (F, 1024)

    def load(self, path):
        """Read torchvision's googlenet state dict (.pth or .safetensors), without its classifiers (fc, aux1, aux2)."""
        return load_cnn(self, path, ("fc.", "aux"))

# ---------------------------------------------------------------------------------------------------------------------
# Their weights

def load_cnn(net, path, heads):
    """Read a CNN's weights from a file, which may also hold classifiers: names that begin like one of `heads`."""
    # BatchNorm's counter: older files lack it, and nobody needs it
    plain = lambda state: {k: v for k, v in state.items() if not k.startswith(heads) and "num_batches" not in k}
    state = plain(load_tensors(path))
    check_names(path, shapes_of(plain(net.state_dict())), shapes_of(state))
    net.load_state_dict(net.state_dict() | state)
    return net


def he_init(net, seed=0):
    """Random weights for a CNN, a function of the seed alone. He: a ReLU halves the variance."""
    for name, p in net.named_parameters():
        p.data = init_weight(name, p.shape, seed) * (2**0.5 if p.dim() > 1 else 1)
    return net


def open_googlenet(weights):
    """The paper's CNN with torchvision's weights, a .pth or .safetensors; "random": for trials of speed."""
    if not weights:
        raise BadInput("weights: googlenet needs a file of torchvision's weights (googlenet-1378be20.pth)")
    return he_init(GoogLeNet()) if weights == "random" else GoogLeNet().load(weights)


def import_torchvision():
    """
    PyPI's torchvision is built for a torch with CUDA. On a CPU torch its library of operators cannot be loaded, and its
    import fails at the first that it wants to describe; none of them is needed here. Called before anything that
    imports it, timm and transformers, which would fail with it.
    """
    if not importlib.util.find_spec("torchvision"):
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        importlib.import_module("torchvision")


def open_timm(backbone, weights):
    """
    timm/NAME -> (model without its classifier, side after squeezing, side of the crop, interpolation, mean, std).
    All but the model as timm notes them.
    """
    name = backbone.removeprefix("timm/")
    try:
        import_torchvision()
        import timm
    except Exception as e:  # also a torchvision that cannot be loaded for another reason
        raise BadInput(f"backbone={backbone}: needs the package timm, pip install timm ({e})") from None
    if not timm.is_model(name.split(".")[0]):
        raise BadInput(f"backbone={backbone}: timm {timm.__version__} has no model of this name")
    if not weights:
        print0(f"backbone {backbone}: no weights=FILE is given, "
               "so timm looks for its pre-trained ones on this machine and else downloads them")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # weights=random are the same for everybody
            cnn = timm.create_model(name, pretrained=not weights, num_classes=0)
    except Exception as e:  # no network, no such weights, ...
        said = (str(e) or type(e).__name__).splitlines()[0][:200]
        raise BadInput(f"backbone={backbone}: timm cannot make it ({said}); weights=FILE needs no network") from None
    if weights not in ("", "random"):
        heads = cnn.pretrained_cfg.get("classifier") or ()
        load_cnn(cnn, weights, tuple(h + "." for h in ([heads] if isinstance(heads, str) else heads)))
    how = timm.data.resolve_model_data_config(cnn)
    _, height, width = how["input_size"]
    if height != width:
        raise BadInput(f"backbone={backbone}: takes frames of {width}x{height}, "
                       "only squares are squeezed and cropped here")
    return cnn, int(height / how["crop_pct"]), height, how["interpolation"].upper(), how["mean"], how["std"]


# backbone= -> a function of weights= that makes a module with .features(frames);
# pixels of the square that a frame is squeezed to, and of its middle that is taken
CNNS = {
    "toycnn": (lambda weights: RandomCNN(), 64, 64),
    "googlenet": (open_googlenet, 256, 224),
}
