"""Messages about loading, to mmengine's log if mmengine is imported, otherwise
to Python's."""
import logging
import sys


def say(message: str, level: int = logging.INFO) -> None:
    """Log a message.

    Args:
        message: the text, of one or more lines.
        level: a level of the logging module.
    """
    if 'mmengine' in sys.modules:
        from mmengine.logging import print_log
        print_log(message, 'current', level)
    else:
        logging.getLogger('rmoe').log(level, message)
