"""Blend generated pixels into an image without a visible seam."""

import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch


def grid_laplacian(height, width):
    """The Laplacian of a grid's pixels, sparse [H*W, H*W]: in row i the number of neighbours of
    pixel i at i, -1 at each neighbour. The grid's edges are free (Neumann boundary)."""
    paths = [scipy.sparse.diags([1.0, 1.0], [-1, 1], (side, side)) for side in (width, height)]
    return scipy.sparse.csgraph.laplacian(scipy.sparse.kronsum(*paths)).tocsr()


def lay_in(image, completions, hidden):
    """Blend `completions` [n, C, H, W] into `image` [C, H, W] where `hidden` bool [H, W] is True.

    The difference between both along the border is subtracted inside, continued as smoothly as
    possible (Perez et al., Poisson Image Editing, 2003). Pixels that are not hidden stay as they
    are, to the bit. All values in [0, 1]; returns [n, C, H, W].
    """
    laid = torch.where(hidden, completions, image)
    if hidden.all() or not hidden.any():
        return laid
    inside = hidden.flatten().numpy()
    laplacian = grid_laplacian(*hidden.shape)[inside]  # [hidden, H*W]
    difference = (image - completions).flatten(0, 1).flatten(1).double().numpy().T  # [H*W, n*C]
    border = -laplacian[:, ~inside] @ difference[~inside]
    smooth = scipy.sparse.linalg.splu(laplacian[:, inside].tocsc()).solve(border)
    smooth = torch.from_numpy(smooth.T).float().view(*completions.shape[:2], -1)  # [n, C, hidden]
    laid[:, :, hidden] = (laid[:, :, hidden] + smooth).clamp(0, 1)
    return laid
