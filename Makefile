# `make demo`: pre-training, fine-tuning and a comparison on synthetic faces, in minutes.
# `make app`: a page to try the models of the demo. `make test`: all tests except the long ones.

PYTHON ?= python3
RUN = .venv/bin/python
# The recipes for small data, shortened to a few minutes on two cores.
PRETRAIN = @recipes/pretrain_small_faces.args --data_path synthetic-lab:2000 \
	--epochs 12 --warmup_epochs 1 --save_ckpt_freq 100 --vis_freq 4 --print_freq 1000
LABELS = --data_path synthetic-lab:800:400 --label_fraction 0.1
FINETUNE = @recipes/small_faces_500.args $(LABELS) --epochs 4 --epoch_repeats 20 \
	--print_freq 1000
# What pre-training has to beat: timm's ResNet-18 from scratch, trained for as many minutes in all.
RIVAL = benchmarks/rivals.py --models resnet18 --recipe 1e-3:8:strong $(LABELS) --input_size 48 \
	--minutes_of demo/pre-training demo/pre-trained/seed-0 --threads 1
SEEDS = 0 1
ONE_CORE = OMP_NUM_THREADS=1 $(RUN)

.PHONY: demo app test test-long lint clean FORCE

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements/dev.txt requirements/app.txt requirements/detect.txt
	$(RUN) -m pip install --quiet -r requirements/dev.txt
	touch $@

.venv/app: .venv/run requirements/app.txt requirements/detect.txt
	$(RUN) -m pip install --quiet -r requirements/app.txt
	touch $@

# Two processes or runs at a time, one per core: this is faster than one that uses both cores.
demo: .venv/run
	$(ONE_CORE) -m torch.distributed.run --nproc_per_node=2 main_pretrain.py $(PRETRAIN) \
		--output_dir demo/pre-training
	$(MAKE) -j2 $(SEEDS:%=demo/pre-trained/seed-%)
	$(MAKE) -j2 $(SEEDS:%=demo/rival-%)
	$(RUN) -m util.report demo/pre-training demo/pre-trained/seed-* demo/rivals/resnet18/seed-* \
		--output demo/report.html

demo/pre-trained/seed-%: FORCE
	$(ONE_CORE) main_finetune.py $(FINETUNE) --finetune demo/pre-training/checkpoint-last.pth \
		--seed $* --output_dir $@

demo/rival-%: FORCE
	$(RUN) $(RIVAL) --seeds $* --output_dir demo/rivals

app: .venv/app
	$(RUN) app.py

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m "not long"

test-long: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m long

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf demo output_dir .pytest_cache .ruff_cache
