"""Reasons for not reading a file: its code would have to be executed, or it is
not a file of weights, but something that lies near one."""
import zipfile
from pathlib import Path


class Refused(Exception):
    """Raised if a file names a function or class that it wants to be called."""


def what_it_is(path: Path) -> str | None:
    """Describe a known kind of file that has no loadable weights, and say what
    to do about it; None for any other file."""
    if path.name.endswith('_optim_states.pt'):
        return ("a rank's optimizer state of DeepSpeed ZeRO, which has only "
                'pieces of the weights. The script zero_to_fp32.py beside it '
                'makes one file of weights: python zero_to_fp32.py . OUT')
    if path.name.endswith('.index.json'):
        return ('the index of weights in several files. Make one file of them '
                'with transformers: AutoModel.from_pretrained(FOLDER)'
                ".save_pretrained(OUT, max_shard_size='100GB')")
    if path.suffix == '.distcp':
        return ('a piece of a distributed checkpoint of torch. Make one file '
                'of its folder: python -m '
                'torch.distributed.checkpoint.format_utils dcp_to_torch '
                f'{path.parent} OUT.pth')
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith('/constants.pkl') for name in names):
            return ("a TorchScript archive (OpenAI's CLIP files are), which "
                    'is a program with its weights. If you trust it, extract '
                    'the weights: '
                    f"torch.save(torch.jit.load('{path.name}', 'cpu')"
                    ".state_dict(), 'OUT.pth')")
    return None


def what_folder_it_is(path: Path) -> str | None:
    """Describe a folder in which another program keeps weights, and say how to
    make one file of it; None if it is unknown."""
    if any(path.glob('*_optim_states.pt')) or (
            path / 'zero_to_fp32.py').exists():
        return ('a folder of DeepSpeed ZeRO with pieces of the weights. Make '
                f'one file of them: python {path}/zero_to_fp32.py {path} OUT')
    if any(path.glob('*.distcp')) and not (path / 'rest.pth').exists():
        return ('a distributed checkpoint of torch. Make one file of it: '
                'python -m '
                'torch.distributed.checkpoint.format_utils dcp_to_torch '
                f'{path} OUT.pth')
    return None
