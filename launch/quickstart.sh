#!/usr/bin/env bash
# From nothing to a trained Zebra in a few minutes on two CPU cores: text, tokenizer, data, training with DeepSpeed
# ZeRO-1 over two processes, evaluation, a picture. Needs Python 3.11 or later, gcc and git; makes its own .venv.
# Options are passed on to training: bash launch/quickstart.sh --training.steps 2000
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh ""

out=quickstart
step() { printf '\n== %s\n' "$*"; }

step "1/5 text: the Python standard library's sources"
python launch/quickstart.py corpus $out

step "2/5 tokenizer"
python tools/train_tokenizer.py --input $out/train.jsonl --vocab-size 4096 --output $out/tokenizer.model --force

step "3/5 preprocessing"
for part in train valid; do
    python tools/preprocess_data.py --input $out/$part.jsonl --tokenizer $out/tokenizer.model --output-prefix $out/$part --workers 2 --force
done

step "4/5 training"
rm -rf $out/run
export OMP_NUM_THREADS=1
torchrun --standalone --nproc-per-node 2 pretrain_zebra.py --config launch/recipes/quickstart.yaml "$@"

step "5/5 evaluation on the held-out files, pictures, report, table"
torchrun --standalone --nproc-per-node 2 tools/evaluate.py perplexity --checkpoint $out/run --data $out/valid
python tools/report.py $out/run
python launch/quickstart.py table $out
