"""All ranks end well, or none."""
import pytest
from parallel_ranks import checked
from two_ranks import run_two_ranks

from rmoe.parallel.together import together


def test_one_process_just_works():
    assert together(lambda: 3) == [3]
    with pytest.raises(KeyError, match='alone') as caught:
        together(lambda: {}['alone'])
    assert caught.value.__cause__ is None


def test_all_raise_or_none(tmp_path):
    first, second = run_two_ranks(checked, str(tmp_path))
    assert first[0] == second[0] == first[5] == second[5] == [0, 1]
    # One rank has the error of its own, the other says whose it is.
    told = [('ValueError', 'rank 0 fails'), ('ValueError', 'rank 1 fails'),
            ('ValueError', 'rank 0 fails')]
    assert [found[:2] for found in first[1:4]] == told
    assert [found[:2] for found in second[1:4]] == told
    assert [found[2] for found in first[1:4]] == [
        'None', 'rank 1 met this error', 'None']
    assert [found[2] for found in second[1:4]] == [
        'rank 0 met this error', 'None', 'rank 0 met this error']
    # A class that no pickle can bring back travels as what it says.
    assert first[4][:2] == ('RuntimeError', 'Unpicklable: rank 1 fails')
    assert second[4] == ('Unpicklable', 'rank 1 fails', 'None')
