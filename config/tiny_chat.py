# A chat model from scratch: config/tiny_play.py's model, fine-tuned on the ferrywoman's conversations. It babbles,
# since a million parameters that have read one play know no facts, but it shows the whole path in a minute.
#   python train.py config/tiny_play.py && python train.py config/tiny_chat.py
#   python chat.py --model=out/tiny_chat
#   python export_gguf.py --model=out/tiny_chat                     # for llama.cpp and Ollama
out_dir = "out/tiny_chat"
init_from = "out/tiny_play"
tokenizer = "out/tiny_play"  # it has no chat template, so ChatML is used
dataset = "tiny_chat"
input = "data/chat/conversations.jsonl"

block_size = 512
global_batch_size = 4
micro_batch_size = 4
max_iters = 60  # almost two and a half epochs
learning_rate = 1e-3
min_lr = 0.0
warmup_iters = 6
weight_decay = 0.1

eval_interval = 30  # the first evaluation comes before step 1
log_interval = 25
sample_interval = 60
