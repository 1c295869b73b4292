#!/usr/bin/env bash
# A file of requests in OpenAI's batch format, answered with stairs and without a server.
#
#   examples/run_batch.sh [INPUT [OUTPUT]]
#
# TARGET, DRAFT and METHOD in the environment choose another pair or another method.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

input=${1:-examples/batch.jsonl}
output=${2:-results/batch.jsonl}
target=${TARGET:-models/smollm2-135m-instruct}
draft=${DRAFT:-$target}
method=${METHOD:-stairs}

mkdir -p "$(dirname "$output")"
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
.venv/bin/vllm run-batch --input-file "$input" --output-file "$output" \
  --model "$target" --served-model-name smollm2 --dtype float32 --max-model-len 2048 \
  --speculative-config "{\"method\": \"$method\", \"model\": \"$draft\", \"num_speculative_tokens\": 4}"
echo "run-batch: $(wc -l <"$output") answers in $output"
