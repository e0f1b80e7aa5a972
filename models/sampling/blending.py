"""Blend generated pixels into an image without a visible seam."""

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch


def seam_system(hidden):
    """(A, B) of Laplace's equation on the pixels `hidden` bool [H, W]: A u = B v, sparse.

    u are the values of the hidden pixels and v those of all pixels, of which B reads the known
    ones beside hidden ones. The image's edges are free (Neumann boundary).
    """
    number = np.full(hidden.shape, -1)
    number[hidden] = np.arange(hidden.sum())
    everywhere = np.arange(hidden.size).reshape(hidden.shape)
    inside, outside = [], []  # (hidden pixel, its neighbour)
    for axis in (0, 1):
        for step in (0, 1):
            here, there = (slice(1, None), slice(-1))[:: 1 if step else -1]
            if axis == 1:
                here, there = (slice(None), here), (slice(None), there)
            both = hidden[here] & hidden[there]
            inside.append(np.stack((number[here][both], number[there][both])))
            edge = hidden[here] & ~hidden[there]
            outside.append(np.stack((number[here][edge], everywhere[there][edge])))
    inside, outside = np.hstack(inside), np.hstack(outside)
    count = int(hidden.sum())
    neighbours = np.bincount(np.hstack((inside[0], outside[0])), minlength=count)
    between = scipy.sparse.coo_matrix((np.ones(inside.shape[1]), inside), (count, count))
    border = scipy.sparse.coo_matrix((np.ones(outside.shape[1]), outside), (count, hidden.size))
    return (scipy.sparse.diags(neighbours.astype(float)) - between).tocsc(), border.tocsr()


def lay_in(image, completions, hidden):
    """Blend `completions` [n, C, H, W] into `image` [C, H, W] where `hidden` bool [H, W] is True.

    The difference between both along the border is subtracted inside, continued as smoothly as
    possible (Perez et al., Poisson Image Editing, 2003). Pixels that are not hidden stay as they
    are, to the bit. All values in [0, 1]; returns [n, C, H, W].
    """
    laid = torch.where(hidden, completions, image)
    if hidden.all() or not hidden.any():
        return laid
    matrix, border = seam_system(hidden.numpy())
    difference = (image - completions).flatten(0, 1).flatten(1).double().numpy()  # [n*C, H*W]
    smooth = scipy.sparse.linalg.splu(matrix).solve(np.ascontiguousarray((border @ difference.T)))
    smooth = torch.from_numpy(smooth.T).float().view(*completions.shape[:2], -1)  # [n, C, hidden]
    laid[:, :, hidden] = (laid[:, :, hidden] + smooth).clamp(0, 1)
    return laid
