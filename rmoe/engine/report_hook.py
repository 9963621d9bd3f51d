"""A report at the end of training."""
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rmoe.engine.wrappers import unwrapped
from rmoe.parallel.layout import is_laid_out
from rmoe.registry import HOOKS
from rmoe.report import DEFAULT_NAME, missing_packages, write_report
from rmoe.version import __version__


@HOOKS.register_module()
class ReportHook(Hook):
    """Writes ``report.html`` into the work dir when training ends: what
    tools/report.py makes of it, on the first rank.

    Never a reason for training to fail: whatever goes wrong is one line of
    the log. The model is built a second time, from the config and the last
    checkpoint; of a sharded one, which one process may not hold, the report
    has no images.

    Args:
        enabled: False switches it off, where a config inherits it.
        images: of the validation set, drawn with the expert of each patch; 0
            leaves out all that needs the model and data.
        count_images: of the validation set, over which it is counted which
            classes each expert takes.

    Raises:
        ValueError: for a negative number.
    """
    # After all that writes into the work dir.
    priority = 'LOWEST'

    def __init__(self, enabled: bool = True, images: int = 4,
                 count_images: int = 32) -> None:
        for name, number in (('images', images),
                             ('count_images', count_images)):
            if number < 0:
                raise ValueError(f'{name}={number} must not be negative')
        self.enabled = enabled
        self.images = images
        self.count_images = count_images

    def before_train(self, runner: Runner) -> None:
        if not (self.enabled and is_main_process()):
            return
        # The report reads it.
        runner.logger.info(f'rmoe {__version__}')
        # In time to install them.
        if missing := missing_packages():
            runner.logger.warning(
                f'there will be no {DEFAULT_NAME}: {missing}; '
                f'then python tools/report.py {runner.work_dir}')

    def after_train(self, runner: Runner) -> None:
        if not (self.enabled and is_main_process()) or missing_packages():
            return
        images = self.images
        if is_laid_out(unwrapped(runner.model)):
            images = 0
        try:
            path = write_report([Path(runner.work_dir)], images=images,
                                count_images=self.count_images)
        except Exception as error:
            runner.logger.warning(
                f'no {DEFAULT_NAME} was written: {type(error).__name__}: '
                f'{error}; python tools/report.py {runner.work_dir} tries '
                'again')
        else:
            runner.logger.info(f'a report of this run: {path}')
