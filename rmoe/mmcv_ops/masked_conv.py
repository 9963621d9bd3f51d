"""Convolution at chosen places of a map only, which guided anchoring
(1901.03278) uses in testing."""
from torch import Tensor
from torch.nn import functional as F


def masked_im2col_forward(im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor,
                          col: Tensor, kernel_h: int, kernel_w: int,
                          pad_h: int, pad_w: int) -> None:
    """Write to ``col`` (C * kernel_h * kernel_w, n) the part of the
    (1, C, H, W) map that the kernel covers at each of n places."""
    padded_width = im.shape[3] + 2 * pad_w - kernel_w + 1
    columns = F.unfold(im, (kernel_h, kernel_w), padding=(pad_h, pad_w))
    col.copy_(columns[0][:, mask_h_idx * padded_width + mask_w_idx])


def masked_col2im_forward(col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor,
                          im: Tensor, height: int, width: int, channels: int
                          ) -> None:
    """Write (C, n) ``col`` to its n places in the (1, C, H, W) map."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
