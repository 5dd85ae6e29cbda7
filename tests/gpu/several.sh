#!/bin/sh
# Everything that needs several GPUs of one host, on as many as there are: tests, then JSON lines into $OUT (default: .).
# NVLink multicast stays off. Each benchmark has a time limit, so that one that hangs does not take the others' time.
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
gpus=$(nvidia-smi -L | wc -l)
out=${OUT:-.}
export OMP_NUM_THREADS=1 NCCL_NVLS_ENABLE=0
[ "$gpus" -ge 2 ] || { echo "needs two GPUs or more, found $gpus" >&2; exit 2; }

bench() { # name of the file, seconds, what launch/bench.py is told
    file=$out/$1.jsonl seconds=$2
    shift 2
    timeout "$seconds" "$python" launch/bench.py "$@" >"$file" 2>"$file.err"
    echo "$file: exit code $?, $(wc -l <"$file") results"
    cut -c1-600 "$file"
}

timeout 150 "$python" -m pytest -q -m gpu tests/gpu/test_symmetric.py tests/gpu/test_graphs.py
bench exchange 120 bench=exchange "bench.rank_list=$gpus" bench.hidden_list=4096,7168 bench.token_list=1,16,64,256,4096
bench serve_small 300 bench=gpu_serve "bench.rank_list=1,$gpus" bench.stream_list=1,32,256
bench recovery_demo 400 bench=gpu_recovery "bench.ranks=$gpus" bench.dtype=float32
bench recovery_experts 400 bench=gpu_recovery "bench.ranks=$gpus" bench.model=random bench.redundant_slots=0
bench rebalance 400 bench=rebalance bench.device=cuda "bench.ranks=$gpus" bench.model=random bench.dtype=bfloat16 \
    bench.threshold=1.0
bench serve_30b 590 bench=gpu_serve bench.shape=qwen3_30b "bench.rank_list=1,$gpus" bench.stream_list=1,32,256
