# A small SmolLM2 on the play of this repository: the first half of a chat model from scratch, without any download.
#   python train.py config/tiny_play.py
#   python train.py config/tiny_chat.py       # the second half: conversations
out_dir = "out/tiny_play"
dataset = "play_1k"
input = "data/shakespeare/play.txt"
vocab_size = 1024

hidden_size = 256
intermediate_size = 704  # 8/3 of 256, rounded to 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2

block_size = 512  # the context of the chat model, too
global_batch_size = 4
micro_batch_size = 4
max_iters = 150  # nine times through the play; more of them memorize it
learning_rate = 3e-3
min_lr = 1e-4
warmup_iters = 50
weight_decay = 0.5  # with the noise, against memorizing a short text
token_noise = 0.1

eval_interval = 50
log_interval = 50
