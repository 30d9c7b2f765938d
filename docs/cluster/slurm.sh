#!/bin/bash
# Learner ranks and rollout replicas under SLURM:   sbatch docs/cluster/slurm.sh
# The first machine of the allocation drives the run; Ray places ranks and replicas on all of them, one per GPU.
# Lines that end in `#` are yours to change.
# Not run in this form by the authors: it follows Ray's documentation for SLURM. docs/scaling.md says what was run.
# Ray 2.60 wants one token on all machines: a shared home folder has it, else set RAY_AUTH_MODE=disabled for all.
#SBATCH --job-name=forerun
#SBATCH --nodes=5                 # 8 ranks + 31 replicas + the driver's policy on 40 GPUs
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8         #
#SBATCH --cpus-per-task=64        #
#SBATCH --time=12:00:00           #
#SBATCH --requeue                 # a requeued job runs this script again, and `--resume` below continues the run
set -euo pipefail

RECIPE=gsm8k                      #
RUNS=$SLURM_SUBMIT_DIR/runs       # on a file system that outlives the job and that all machines share: ranks write there
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}'):6379

# The last GPU of this machine is the driver's: Ray gets the others. Its policy evaluates with loop.lag, makes the cold
# start and trains the drafter. To train in the driver's process, too, leave train.ranks out.
srun --nodes=1 --ntasks=1 --overlap -w "$head" \
  ray start --head --port=6379 --num-gpus=7 --include-dashboard=false --block &
sleep 20
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 --overlap -w "$node" ray start --address="$address" --num-gpus=8 --block &
done
sleep 30

# A requeued job resumes its run from the newest checkpoint.
if compgen -G "$RUNS/latest/checkpoints/step-??????/complete" > /dev/null; then
  what=(--resume "$RUNS/latest")
else
  what=("$RECIPE" runs="$RUNS")
fi
srun --nodes=1 --ntasks=1 --overlap -w "$head" forerun train "${what[@]}" \
  rollout.engine=vllm rollout.replicas=31 train.ranks=8 policy.device=cuda:7 policy.dtype=bfloat16 compare.steps=0 \
  cluster.address="$address" cluster.gpus_per_replica=1 cluster.cpus_per_replica=6 \
  cluster.gpus_per_rank=1 cluster.cpus_per_rank=6 checkpoint.every=10 train.prompts_per_step=64
# 64 prompts of 8 samples are 16 for a replica; with the recipe's own 8 prompts each would have two.
