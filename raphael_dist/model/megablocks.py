"""`model.expert_backend=megablocks`: the grouped matrix product of MegaBlocks, for bfloat16 on a GPU.

The product comes from the package grouped_gemm, which is built with nvcc, or from a folder with a finished build, which the
package `kernels` loads (`model.megablocks_folder`).

Shape legend: R rows (token vectors), K experts.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from raphael_dist.errors import UserError

# docs/install.md says how far these commands were tested.
GROUPED_GEMM = "GROUPED_GEMM_CUTLASS=1 pip install --no-build-isolation --no-deps grouped_gemm==0.3.0"
KERNELS = "pip install kernels==0.17.2"


def megablocks_product(counts_K: Tensor, folder: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function (x, w) that multiplies each row of x with the matrix of its expert k, `x w_k^T`, [R, out].

    x is [R, in] with rows sorted by expert, and w is [K, out, in]. `counts_K` is the number of rows of each expert, int64.
    The counts stay on the device. `folder`: the setting `model.megablocks_folder`, a local folder from which the product is
    loaded; None: the package grouped_gemm.

    Raises:
        UserError: the package is not installed, or the folder cannot be loaded.
    """
    gmm = _gmm_of_package() if folder is None else _gmm_of_folder(folder)
    return lambda x, w: gmm(x.contiguous(), w, counts_K, trans_b=True)


def _gmm_of_package() -> Callable[..., Tensor]:
    try:
        from grouped_gemm.ops import gmm
    except ImportError:
        raise UserError(
            "model.expert_backend=megablocks requires the package grouped_gemm, which is not installed. Build it on a "
            f"machine with nvcc and a GPU with `{GROUPED_GEMM}` (docs/install.md), set model.megablocks_folder, or set "
            "model.expert_backend=auto."
        ) from None
    product: Callable[..., Tensor] = gmm
    return product


@cache
def _gmm_of_folder(folder: str) -> Callable[..., Tensor]:
    try:
        from kernels import get_local_kernel
    except ImportError:
        raise UserError(
            f"model.megablocks_folder={folder} requires the package kernels, which is not installed. Run `{KERNELS}`, or "
            "set model.megablocks_folder=null to use the package grouped_gemm."
        ) from None
    try:
        product: Callable[..., Tensor] = get_local_kernel(Path(folder)).gg_ops.gmm
    except Exception as error:  # whatever the code in the folder raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model.megablocks_folder={folder} must hold a build of the kernel megablocks for this system, but loading it "
            f"fails: {reason.rstrip('.:')}. Download kernels-community/megablocks again for the installed torch, or set "
            "model.megablocks_folder=null to use the package grouped_gemm."
        ) from error
    return product


def require_megablocks(folder: str | None) -> None:
    """Raise UserError if `model.expert_backend=megablocks` cannot run.

    This backend requires a matrix product that reads the number of rows of each expert on the device.

    `folder`: the setting `model.megablocks_folder`, a local folder whose build is used; None: the package grouped_gemm.
    """
    sizes_K = torch.tensor([8])
    product = megablocks_product(sizes_K.cuda() if torch.cuda.is_available() else sizes_K, folder)
    if not torch.cuda.is_available():
        return
    x, w = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((8, 8), (1, 8, 8)))
    try:
        product(x, w)
    except RuntimeError as error:
        raise UserError(
            "model.expert_backend=megablocks requires a matrix product that reads the number of rows per expert on the GPU, "
            f"but the matrix product of {folder or 'grouped_gemm'} fails: {str(error).splitlines()[0]}. Install "
            f"grouped_gemm with `{GROUPED_GEMM}` and leave out model.megablocks_folder, or set model.expert_backend=auto."
        ) from error
