"""Downloads weights by name, with the libraries that publish them."""
from typing import Any

from torch import Tensor

SCHEMES = ('timm:', 'hf:')


def is_hub(name: str) -> bool:
    """Whether a name is 'timm:NAME' or 'hf:NAME' and not that of a file."""
    return name.startswith(SCHEMES)


def download(name: str) -> Any:
    """Download the pretrained weights of a timm model, or the weights file of a
    Hugging Face repository. Each library keeps its own cache.

    Args:
        name: e.g. 'timm:vit_small_patch16_224.augreg_in21k' or
            'hf:microsoft/cvt-13'.

    Returns:
        dict(state_dict=...) from timm, or the path of the downloaded file.

    Raises:
        ValueError: if the library is missing or knows no such name, or if no
            hub can be reached.
    """
    scheme, _, model = name.partition(':')
    library = 'timm' if scheme == 'timm' else 'huggingface_hub'
    try:
        return _from_timm(model) if scheme == 'timm' else _from_hf(model)
    except ImportError:
        raise ValueError(f'{name} needs the package {library}: pip install '
                         f'{library}') from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise ValueError(
            f'{name} could not be downloaded by {library}: {reason}. Where no '
            'hub can be reached, download the weights elsewhere and give the '
            'file') from error


def _from_timm(model: str) -> dict[str, dict[str, Tensor]]:
    import timm
    return dict(state_dict=timm.create_model(
        model, pretrained=True).state_dict())


def _from_hf(model: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError
    try:
        return hf_hub_download(model, 'model.safetensors')
    except EntryNotFoundError:
        return hf_hub_download(model, 'pytorch_model.bin')
