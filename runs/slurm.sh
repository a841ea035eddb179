#!/bin/bash
# Trains on several machines under Slurm, with one process for each GPU, which a single `srun` starts:
#
#   sbatch runs/slurm.sh train_summarize.py --train_file train.jsonl --validation_file validation.jsonl ...
#
# Five minutes before the time limit Slurm sends SIGUSR1 to the processes. The run saves and ends with code 138, the job is
# queued again, and the run goes on where it was. So it does if a machine fails. What the machines must share is said in
# accelerate_configs/multi_node.yaml. A model that is too large for one GPU: set the FSDP_* variables that
# accelerate_configs/fsdp2.yaml stands for, and ACCELERATE_USE_FSDP=true.
#
# It has not run on a cluster yet. tests/test_machines.py runs it with stand-ins for `srun` and `scontrol`.
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}

# `exec`, so that signals reach Python; a process that fails ends the others
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python "$@"' bash "$@"
code=$?
[ $code = 138 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
