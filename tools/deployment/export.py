"""Export a trained model to ONNX, or to torch.export's format, and check the
file.

    python tools/deployment/export.py CONFIG CHECKPOINT --out model.onnx

A segmentor is exported as a whole, from normalised images to logits at the
resolution of its head. Of any other model only the backbone is exported, from
normalised images to feature maps. The file contains all experts. It is loaded
again, run on the example with which it was exported and on other images, and
compared with the model.
"""
import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _config import run

from rmoe import compat
from rmoe.engine.trained import trained_model
from rmoe.moe.recording import record_routing

Run = Callable[[Tensor], Sequence[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, required=True,
                        help='file to write, .onnx or .pt2')
    parser.add_argument('--shape', type=int, nargs=2, default=(512, 512),
                        metavar=('HEIGHT', 'WIDTH'),
                        help='shape of the images, which is fixed in the file')
    parser.add_argument('--batch-size', type=int, default=1,
                        help='number of images, which is also fixed in the '
                        'file')
    parser.add_argument('--checks', type=int, default=8,
                        help='number of images, beside the example, on which '
                        'outputs are compared')
    parser.add_argument('--tolerance', type=float, default=1e-3,
                        help='largest difference that is allowed, over the '
                        'largest output')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    if args.out.suffix not in ('.onnx', '.pt2'):
        raise ValueError(f'--out={args.out} must end with .onnx or .pt2')
    if min(*args.shape, args.batch_size) < 1:
        raise ValueError('--shape and --batch-size must be at least 1')
    compat.require('export by torch.export or to ONNX')
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    model = load_model(cfg, args.checkpoint)
    channels = next(each.in_channels for each in model.modules()
                    if isinstance(each, nn.Conv2d))
    example, *others = make_images(
        args.checks + 1, (args.batch_size, channels, *args.shape))
    with torch.no_grad():
        exported = write(torch.export.export(model, (example, )), example,
                         args.out)
        print(f'wrote {args.out}')
        compare(model, exported, [example, *others], args.tolerance)


def load_model(cfg: Config, checkpoint: str) -> nn.Module:
    """The module to export, with its weights, in evaluation mode."""
    model = trained_model(cfg, checkpoint, 'cpu', strict=True)
    if not hasattr(model, 'decode_head'):
        print(f'{type(model).__name__} is no segmentor: its backbone alone '
              'is exported')
        model = model.backbone
    return model


def make_images(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Random images, from fine to coarse noise. Experts often specialise in
    textures, so that noise of one kind would use only few of them."""
    torch.manual_seed(0)
    images = []
    for i in range(count):
        sides = [max(side >> (i % 6), 1) for side in shape[2:]]
        noise = torch.randn(*shape[:2], *sides)
        images.append(F.interpolate(noise, shape[2:], mode='bilinear'))
    return images


def write(program: torch.export.ExportedProgram, example: Tensor, out: Path
          ) -> Run:
    """Write the file, and return a function that runs it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == '.pt2':
        torch.export.save(program, out)
        loaded = torch.export.load(out).module()
        return lambda image: flat(loaded(image))
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'--out={out} needs {error.name}: pip install onnx '
                         'onnxruntime onnxscript') from None
    torch.onnx.export(program, (example, ), dynamo=True,
                      verbose=False).save(out)
    session = onnxruntime.InferenceSession(str(out))
    name = session.get_inputs()[0].name
    return lambda image: [torch.from_numpy(output) for output in session.run(
        None, {name: image.numpy()})]


def flat(outputs: Tensor | Sequence) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in flat(output)]


def compare(model: nn.Module, exported: Run, images: list[Tensor],
            tolerance: float) -> None:
    """Compare the outputs of the exported file with those of the model.

    Raises:
        ValueError: if they differ by more than the tolerance.
    """
    worst = largest = 0.
    with record_routing(model) as records:
        for image in images:
            for found, wanted in zip(exported(image), flat(model(image)),
                                     strict=True):
                worst = max(worst, float((found - wanted).abs().max()))
                largest = max(largest, float(wanted.abs().max()))
    for name, routings in records.items():
        loads = torch.stack([routing.load_E for routing in routings]).sum(0)
        print(f'{name}: {int((loads > 0).sum())} of {len(loads)} experts '
              'were in use')
    print(f'largest difference on {len(images)} inputs: {worst:.2g}, '
          f'largest output: {largest:.2g}')
    if not worst <= tolerance * largest:
        raise ValueError(
            f'the exported model is off by {worst:.2g}, more than '
            f'--tolerance={tolerance} of the largest output {largest:.2g}. '
            'A single token with two equally good experts can cause that: look '
            'at the outputs, and give a larger --tolerance if the difference '
            'is in one place only')


if __name__ == '__main__':
    run(main)
