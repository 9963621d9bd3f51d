"""Tests do not depend on which tests ran before them in the same process."""
from fresh_process import forget
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmseg.visualization import SegLocalVisualizer

KINDS = (MMLogger, MessageHub, DefaultScope, SegLocalVisualizer)


def test_nothing_of_earlier_runs_is_left(tmp_path):
    MMLogger.get_instance('earlier')
    MessageHub.get_instance('earlier')
    DefaultScope.get_instance('earlier', scope_name='mmseg')
    SegLocalVisualizer.get_instance('earlier', save_dir=str(tmp_path))
    assert all(kind.check_instance_created('earlier') for kind in KINDS)
    forget()
    assert not any(kind.check_instance_created('earlier') for kind in KINDS)


def test_every_test_begins_with_nothing(request):
    assert '_fresh_process' in request.fixturenames
