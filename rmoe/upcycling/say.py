"""Messages of loading: to mmengine's log where mmengine runs, else to
Python's."""
import logging
import sys


def say(message: str, level: int = logging.INFO) -> None:
    """Log a message.

    Args:
        message: it may have several lines.
        level: of the logging module.
    """
    if 'mmengine' in sys.modules:
        from mmengine.logging import print_log
        print_log(message, 'current', level)
    else:
        logging.getLogger('rmoe').log(level, message)
