#!/bin/bash
# 2 nodes x 8 GPUs under SLURM; goes on by itself after a time limit, a preemption or a dead node.
#   sbatch pretrain/slurm_2x8.sh --train_data_dir data/slim_star_combined --val_data_dir data/slim_star_combined
# Other numbers go to sbatch, in front of the script: sbatch --nodes=4 pretrain/slurm_2x8.sh ...
#SBATCH --job-name=tinyllama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tinyllama-%j.log
# Five minutes before the limit every process is asked to stop: it finishes its step and saves.
#SBATCH --signal=USR1@300

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
started=$(date +%s)
# One task is one rank. If one dies the others end by themselves within a minute, and the log names it.
srun python pretrain/tinyllama.py --devices "$SLURM_NTASKS_PER_NODE" --num_nodes "$SLURM_JOB_NUM_NODES" \
    --resume auto --requeue_exit_code 85 "$@"
code=$?
# 85: asked to stop, and saved. Anything else: once more if this start got as far as a checkpoint.
if [ $code -eq 85 ] || { [ $code -ne 0 ] && [ -n "$(find out -maxdepth 2 -name 'step-*[0-9]' -newermt "@$started")" ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
