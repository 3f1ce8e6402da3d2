# shellcheck shell=bash disable=SC2034  # sourced: who does so reads the variables
# Which devices this machine has.

# How many GPUs there are, of those that CUDA_VISIBLE_DEVICES allows.
count_gpus() {
  local visible=${CUDA_VISIBLE_DEVICES-all}
  if ! command -v nvidia-smi >/dev/null 2>&1 || [[ -z $visible || $visible == -1 ]]; then
    echo 0
  elif [[ $visible == all ]]; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  else
    tr ',' '\n' <<<"$visible" | grep -c .
  fi
}

# What runs whose layouts are made of fours use here. Sets processes, precision (a flag) and where
# (in words).
choose_devices() {
  local gpus
  gpus=$(count_gpus)
  precision=--bf16
  if [[ $gpus -ge 4 ]]; then
    processes=$((gpus / 4 * 4))
    where="$processes GPUs"
  elif [[ $gpus -ge 1 ]]; then
    processes=1
    where="1 GPU"
  else
    processes=4
    where="4 processes on the CPU"
    if ! grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null; then
      precision=--no-bf16  # emulated, bf16 is many times slower
      where="$where in fp32 (no bf16 units)"
    fi
  fi
}
