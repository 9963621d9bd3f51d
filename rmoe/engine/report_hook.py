"""Writes an HTML report of the run at the end of training."""
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rmoe.engine.wrappers import unwrapped
from rmoe.parallel.layout import is_laid_out
from rmoe.registry import HOOKS
from rmoe.report import (
    DEFAULT_NAME,
    check_counts,
    missing_packages,
    write_report,
)
from rmoe.version import __version__


@HOOKS.register_module()
class ReportHook(Hook):
    """Writes ``report.html`` into the work dir when training ends.

    It is the report that tools/report.py makes of the work dir; the first
    rank writes it. An error while writing it never makes the training fail,
    but is a warning in the log. For the images in the report the model is
    built a second time, from the config and the last checkpoint. The report
    of a sharded model has no images, because the model may not fit into one
    process.

    Args:
        enabled: False switches the hook off in a config that inherits it.
        images: number of images of the validation set that are drawn with the
            expert of each patch. With 0 the report leaves out everything that
            needs the model and the data.
        count_images: number of images of the validation set from which is
            counted which classes each expert takes.

    Raises:
        ValueError: for a negative number.
    """
    # The hook must run after all hooks that write into the work dir.
    priority = 'LOWEST'

    def __init__(self, enabled: bool = True, images: int = 4,
                 count_images: int = 32) -> None:
        check_counts(images, count_images)
        self.enabled = enabled
        self.images = images
        self.count_images = count_images

    def before_train(self, runner: Runner) -> None:
        if not (self.enabled and is_main_process()):
            return
        # The report finds the version in the log.
        runner.logger.info(f'rmoe {__version__}')
        # The warning comes before training, so that there is time to install
        # the packages.
        if missing := missing_packages():
            runner.logger.warning(
                f'{DEFAULT_NAME} will not be written: {missing}. Afterwards '
                f'python tools/report.py {runner.work_dir} writes it')

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
                f'{error}. To try again: python tools/report.py '
                f'{runner.work_dir}')
        else:
            runner.logger.info(f'a report of this run: {path}')
