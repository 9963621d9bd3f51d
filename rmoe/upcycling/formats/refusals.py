"""Why a file is not read: it would have to be executed, or it is no file of
weights but something near it."""
import zipfile
from pathlib import Path


class Refused(Exception):
    """A file names something that would have to be called."""


def what_it_is(path: Path) -> str | None:
    """What a file is that holds no weights as such, and what to do about it;
    None for any other."""
    if path.name.endswith('_optim_states.pt'):
        return ("a rank's optimizer state of DeepSpeed ZeRO, where the "
                'weights are in pieces. Beside it lies zero_to_fp32.py: python '
                'zero_to_fp32.py . OUT makes one file of weights of all')
    if path.name.endswith('.index.json'):
        return ('the index of weights in several files. Make one of them '
                'with transformers: AutoModel.from_pretrained(FOLDER)'
                ".save_pretrained(OUT, max_shard_size='100GB')")
    if path.suffix == '.distcp':
        return ('a piece of a distributed checkpoint of torch. python -m '
                'torch.distributed.checkpoint.format_utils dcp_to_torch '
                f'{path.parent} OUT.pth makes one file of its folder')
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith('/constants.pkl') for name in names):
            return ("a TorchScript archive (OpenAI's CLIP files are), a "
                    'program with its weights. Where you trust it: '
                    f"torch.save(torch.jit.load('{path.name}', 'cpu')"
                    ".state_dict(), 'OUT.pth')")
    return None


def what_folder_it_is(path: Path) -> str | None:
    """What another program's folder of weights is; None if it is unknown."""
    if any(path.glob('*_optim_states.pt')) or (
            path / 'zero_to_fp32.py').exists():
        return ('a folder of DeepSpeed ZeRO, its weights in pieces: python '
                f'{path}/zero_to_fp32.py {path} OUT makes one file of weights')
    if any(path.glob('*.distcp')) and not (path / 'rest.pth').exists():
        return ('a distributed checkpoint of torch: python -m '
                'torch.distributed.checkpoint.format_utils dcp_to_torch '
                f'{path} OUT.pth makes one file of it')
    return None
