"""The commands that the shell scripts start."""
import subprocess
from pathlib import Path

import pytest
import train

TOOLS = Path(train.__file__).parent
STATIC = ('--nnodes={} --node_rank={} --master_addr={} --master_port={}')


def said_by(tmp_path, script, *args, **variables):
    """Return the command line of the program that a script starts."""
    # It replaces python and srun.
    (tmp_path / 'srun').write_text('#!/bin/sh\necho srun "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    done = subprocess.run(
        ['bash', TOOLS / script, *args], capture_output=True, text=True,
        env=dict(PATH=f'{tmp_path}:/usr/bin:/bin', PYTHON='echo',
                 **variables))
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize('script, args, tool', [
    ('dist_train.sh', ('C', '8', '--amp'),
     '--nproc_per_node=8 {}/train.py C --launcher pytorch --amp'),
    ('dist_test.sh', ('C', 'K.pth', '2', '--tta'),
     '--nproc_per_node=2 {}/test.py C K.pth --launcher pytorch --tta'),
])
@pytest.mark.parametrize('variables, meeting', [
    ({}, '--standalone'),  # two runs on one machine take different ports
    (dict(PORT='1'), STATIC.format(1, 0, '127.0.0.1', 1)),
    (dict(NNODES='4', NODE_RANK='2', MASTER_ADDR='first'),
     STATIC.format(4, 2, 'first', 29500)),
])
def test_torchrun(tmp_path, script, args, tool, variables, meeting):
    assert said_by(tmp_path, script, *args, **variables) == (
        f'-m torch.distributed.run {meeting} {tool.format(TOOLS)}')


@pytest.mark.parametrize('script, args, tool', [
    ('slurm_train.sh', ('P', 'J', 'C', '--amp'),
     '{}/train.py C --launcher slurm --amp'),
    ('slurm_test.sh', ('P', 'J', 'C', 'K.pth', '--tta'),
     '{}/test.py C K.pth --launcher slurm --tta'),
])
@pytest.mark.parametrize('variables, resources', [
    ({}, '--gres=gpu:8 --ntasks=8 --ntasks-per-node=8 --cpus-per-task=5 '
     '--kill-on-bad-exit=1'),
    (dict(GPUS='2'), '--gres=gpu:2 --ntasks=2 --ntasks-per-node=2 '
     '--cpus-per-task=5 --kill-on-bad-exit=1'),
    (dict(GPUS='16', SRUN_ARGS='--nodes=2 --mem=0', CPUS_PER_TASK='9'),
     '--gres=gpu:8 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=9 '
     '--kill-on-bad-exit=1 --nodes=2 --mem=0'),
    (dict(GPUS='4', GRES=''), '--ntasks=4 --ntasks-per-node=4 '
     '--cpus-per-task=5 --kill-on-bad-exit=1'),
])
def test_slurm(tmp_path, script, args, tool, variables, resources):
    assert said_by(tmp_path, script, *args, **variables) == (
        f'srun -p P --job-name=J {resources} echo -u {tool.format(TOOLS)}')


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh',
                                    'slurm_train.sh', 'slurm_test.sh'])
def test_without_arguments(script):
    done = subprocess.run(['bash', TOOLS / script], capture_output=True,
                          text=True)
    assert done.returncode
    assert f'Usage: {script} ' in done.stderr
