#!/bin/bash
# DPG on several nodes of 8 GPUs under SLURM. The job queues itself again until the training is finished.
#
#     sbatch examples/slurm.sh --config recipes/new_language/8b.yaml --output_dir runs/8b \
#         --per_device_train_batch_size 2 --gradient_accumulation_steps 1
#
# 2 x 16 GPUs are the recipe's batch of 32. ENGINE is an accelerate config, of TRL (multi_gpu, fsdp2, zero2, zero3) or a file.
#SBATCH --job-name=dpg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue

export ENGINE=${ENGINE:-multi_gpu}
export GPUS=$((8 * SLURM_NNODES))
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One task a node. Each starts the 8 processes of its node, and is told its own number. When a node has ended, the others
# have two minutes.
srun --kill-on-bad-exit=0 --wait=120 bash -c 'exec trl-dpg dpg --accelerate_config "$ENGINE" \
    --num_machines "$SLURM_NNODES" --num_processes "$GPUS" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$HEAD" --main_process_port 29500 --resume_from_checkpoint auto "$@"' dpg "$@"
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
