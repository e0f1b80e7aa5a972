"""Copies between this process' memory, where arrays of NumPy hold what is planned, and a device."""

import torch


def to_device(array, device):
    """An array as a tensor on a device; a GPU copies it while this process goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor):
    """A tensor as an array: the one way in which sampling methods wait for a device."""
    return tensor.cpu().numpy()
