"""Tensors that claim to lie on a GPU and are computed on the CPU: what mixes devices fails."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {  # operations that may read one device and write another
    aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default,
}




def batch_norm(x, *arguments):
    return *aten.native_batch_norm.default(x, *arguments), x.new_empty(0, dtype=torch.uint8)


def attention(query, key, value, *arguments, **options):
    """Output and log-sum-exp, of which only the former is used without gradients."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return out, query.new_empty(query.shape[:-1]), torch.tensor(0), torch.tensor(0)


ON_CPU = {  # operations that only a GPU has, by what computes the same
    aten.cudnn_batch_norm.default: batch_norm,
    aten._scaled_dot_product_efficient_attention.default: attention,
}


class Claimed(torch.Tensor):
    """A tensor whose `device` is a GPU; `inner` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CUDA, requires_grad=requires_grad,
        )
        found.inner = inner
        return found

    def __repr__(self):
        return f"Claimed({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a claimed tensor outside of `claimed_devices`")


class ClaimedDevices(TorchDispatchMode):
    """Runs every operation on the CPU, and fails where a GPU would refuse or wait for a copy.

    Tensors of both devices must not meet, but for numbers (0-d) of the CPU; an index on the CPU,
    which torch would copy, must not either, nor a generator of the CPU draw numbers on the GPU.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        claimed = any(isinstance(tensor, Claimed) for tensor in tensors)
        others = [t for t in tensors if not isinstance(t, Claimed) and t.dim() > 0]
        if claimed and func not in MOVES:
            shapes = [list(tensor.shape) for tensor in others]
            assert not others, f"{func} mixes devices: tensors {shapes} lie on the CPU"
        device = kwargs.get("device")
        on_gpu = claimed if device is None else torch.device(device).type == "cuda"
        if func == aten.copy_.default:
            on_gpu = isinstance(args[0], Claimed)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        rng = kwargs.get("generator")
        assert not (on_gpu and rng is not None), f"{func}: a generator of the CPU draws on the GPU"
        with _disable_current_modes():
            inner_args, inner_kwargs = tree_map_only(Claimed, lambda t: t.inner, (args, kwargs))
            found = ON_CPU.get(func, func)(*inner_args, **inner_kwargs)
        # What is written in place is returned as the same object.
        if not on_gpu:
            return found
        known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Claimed)}

        def claim(tensor):
            return known[id(tensor)] if id(tensor) in known else Claimed(tensor)

        return tree_map_only(torch.Tensor, claim, found)


@contextlib.contextmanager
def claimed_devices():
    """Context in which the device "cuda" can be asked for without a card; `torch.load`, which gives
    nothing but shapes where there is a fake mode, reads files as ever."""
    overwrite, load = torch.__future__.get_overwrite_module_params_on_conversion(), torch.load

    def plain_load(*arguments, **options):
        with _disable_current_modes():
            return load(*arguments, **options)

    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.load = plain_load
    try:
        with FakeTensorMode(), ClaimedDevices():  # torch starts CUDA unless there is a fake mode
            yield
    finally:
        torch.load = load
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
