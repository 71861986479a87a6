# The experiment that this project comes from: the full shape on Shakespeare, 5,000 steps, then 50 more after a resume.
#   python train.py config/smol_shakespeare.py config/seed_5000.py
#   python train.py config/smol_shakespeare.py config/seed_5000.py --max_iters=5050
# It goes on top of config/smol_shakespeare.py. Seventeen times through the text: the evaluations should show the
# validation loss turn and the training loss go on ("gap"), and out/seed_5000 keeps the best model, not the last.
# Four to nine hours on two CPU cores; on a GPU many times less. We have run the first 1,000 steps, 3.4 epochs, in which
# the validation loss falls all the way (docs/recipes.md has the curve); the rest we have not.
out_dir = "out/seed_5000"

max_iters = 5000
max_epochs = 18
patience = 0  # to the end, whatever the validation loss does

eval_interval = 250
log_interval = 50
sample_interval = 2500
