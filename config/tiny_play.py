# A small SmolLM2 on the play in this repository: the first half of a chat model from scratch, without a download.
#   python train.py config/tiny_play.py
#   python train.py config/tiny_chat.py       # the second half: conversations
#   python train.py config/tiny_play.py --input=notes.txt --dataset=notes --out_dir=out/notes_play   # a short text
out_dir = "out/tiny_play"
dataset = "play_1k"
input = "data/shakespeare/play.txt"
vocab_size = 1024

hidden_size = 192
intermediate_size = 512  # 8/3 of 192
num_hidden_layers = 2
num_attention_heads = 3
num_key_value_heads = 1

block_size = 512  # also the context of the chat model
global_batch_size = 4
micro_batch_size = 4
max_iters = 250
max_epochs = 15.5  # for a text shorter than the play
optimizer = "muon"
learning_rate = 4e-3
min_lr = 1e-4
warmup_iters = 20
# against memorizing a short text: 2.06 bits per byte, while config/tiny_shakespeare.py reaches 2.17
weight_decay = 1.5
token_noise = 0.1
dropout = 0.1

eval_interval = 50
log_interval = 50
