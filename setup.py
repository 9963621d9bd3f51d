import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def version() -> str:
    scope: dict[str, str] = {}
    exec((ROOT / 'rmoe' / 'version.py').read_text(), scope)
    return scope['__version__']


class BuildWithConfigs(build_py):
    """Copies configs/ into the wheel, as rmoe/configs."""

    def run(self) -> None:
        super().run()
        if not getattr(self, 'editable_mode', False):
            shutil.copytree(ROOT / 'configs',
                            Path(self.build_lib) / 'rmoe' / 'configs',
                            dirs_exist_ok=True)


setup(
    name='rmoe',
    version=version(),
    description='Residual mixture-of-experts backbones for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['rmoe', 'rmoe.*']),
    package_data={'rmoe.report': ['assets/*']},
    cmdclass={'build_py': BuildWithConfigs},
    # torch and OpenMMLab are not listed, because pip would replace the versions
    # that an environment has. ``import rmoe`` and tools/doctor.py say what is
    # missing.
    install_requires=['numpy', 'safetensors', 'matplotlib', 'msgpack'],
    extras_require={
        'openmmlab': [*requirements('mmcv'), *requirements('openmmlab')],
        'report': requirements('report'),
        'deploy': ['onnx', 'onnxruntime', 'onnxscript'],
        'dev': [*requirements('test'), *requirements('dev')],
    },
)
