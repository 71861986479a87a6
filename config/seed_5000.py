# The experiment that this project comes from: the full shape on Shakespeare, 5,000 steps, then 50 more after a resume.
#   python train.py config/smol_shakespeare.py config/seed_5000.py
#   python train.py config/smol_shakespeare.py config/seed_5000.py --max_iters=5050
# It goes on top of config/smol_shakespeare.py. Seventeen times through the text: after six the validation loss turns,
# while the training loss goes on down to 0.2. out/seed_5000 keeps the best model, of step 1,750, not the last. With
# --compile=on a little over three minutes on an H200; 8.5 to 10 hours on two CPU cores, by its first 1,000 steps.
# docs/recipes.md has the curve.
out_dir = "out/seed_5000"

max_iters = 5000
max_epochs = 18
patience = 0  # to the end, whatever the validation loss does

eval_interval = 250
log_interval = 50
sample_interval = 2500
