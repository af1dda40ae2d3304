# One target per stage; a recipe is one script call. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

ENVS := test minitest production
ALGOS := $(sort $(subst _,-,$(patsubst configs/recipe.%.yaml,%,$(wildcard configs/recipe.*.yaml))))
LAUNCHERS := local docker vessl

refuse = $(if $(filter-out $(2),$($(1))),$(error $(1)=$($(1)): not known. $(1) is one of: $(2). For example: make minitest ALGO=critic-wmtp))
$(call refuse,ENV,$(ENVS))
$(call refuse,ALGO,$(ALGOS))
$(call refuse,LAUNCHER,$(LAUNCHERS))

# Only what the caller set travels on: each script knows its own defaults, and make exports what is not set as empty.
set = $(filter-out undefined default,$(origin $(1)))
VARIABLES := ENV ALGO LAUNCHER CONFIG RECIPE RUN_NAME DRY_RUN MAX_HOURS TORCH_BACKEND PYTHON FROM NAME NAMES SET ALLOW RUN_ID RUNS NOTES STEP RESUME TAIL FOLLOW BASE_IMAGE IMAGE_PYTHON REGISTRY_USER SEED SEEDS STEPS STAGES SIGNALS
$(foreach name,$(VARIABLES),$(if $(call set,$(name)),$(eval export $(name))))
# A name that nobody reads would leave the run as it is, and say nothing. It may be one of this file's own: `override`, and 1 for a name.
MORE := AS ENGINE EVICT FORCE ONLY TWIN POLL_S STALL_S WATCH_MAX
SETTINGS := $(VARIABLES) $(MORE) CI NO_COLOR TMPDIR SHELL MAKEFLAGS %_TOKEN %_proxy %_PROXY \
  AWS_% DOCKER_% HF_% LC_% MLFLOW_% OMP_% PIP_% PYTEST_% S3_% UV_% VESSL_% WMTP_%
# Nor are these ours, but what the commands start reads them: CUDA_LAUNCH_BLOCKING=1, NCCL_DEBUG=INFO, LANG=C.
SETTINGS += COLUMNS HOME LANG PATH TERM TZ REQUESTS_CA_BUNDLE TORCH_LOGS BUILDKIT_% CUDA_% GIT_% GLOO_% NCCL_% PYTORCH_% SSL_CERT_% TORCHDYNAMO_% \
  TORCHINDUCTOR_% TORCH_NCCL_% TRITON_% XDG_%
override STRANGE := $(filter-out $(SETTINGS),$(foreach 1,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(1)))),$(1))))
# Of the words in 2 the one that is nearest to 1.
override MEANT = $(shell python3 -c 'import difflib, sys; words = {word.lower(): word for word in sys.argv[2:]}; \
  print(*map(words.get, difflib.get_close_matches(sys.argv[1].lower(), words, 1)))' '$(subst ','\'',$(1))' $(2) 2>/dev/null)
$(foreach 1,$(firstword $(STRANGE)),$(foreach 2,$(or $(call MEANT,$(1),$(VARIABLES) $(MORE)),-),$(error $(1)=$($(1)): not known. \
  rule: a variable that no command reads changes nothing; next: $(if $(filter -,$(2)),make help,$(2)=$($(1))))))

# By content, not by time: a checkout's files may be older than an environment that lacks what they ask for. By its place,
# too: a copied environment still has the other checkout's package.
STAMP := .venv/.installed-$(shell { cat requirements/*.txt pyproject.toml scripts/install.sh; readlink -f .venv; } | cksum | tr ' ' -)

.PHONY: help
help: ##- this list
	@scripts/help.sh Makefile "$(ALGOS)"

$(STAMP):
	@scripts/install.sh $(STAMP)

.PHONY: install
install: $(STAMP) ##- the environment in .venv (every target does this on first use)

.PHONY: minitest
minitest: $(STAMP) ## the whole way, small and on this machine (ALGO=)
	@scripts/minitest.sh

.PHONY: train
train: $(STAMP) ## the local test: one device, no bucket (ALGO=)
	@scripts/train_local.sh

.PHONY: dryrun
dryrun: $(STAMP) ## what can be known to fail before a run (ENV= ALGO= ONLY=)
	@scripts/test_vessl_config.sh

.PHONY: sync
sync: $(STAMP) ##- a run's models from the bucket (CONFIG= RECIPE= NAME=)
	@scripts/sync_models.sh $(if $(CONFIG),--config "$(CONFIG)") $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(NAME),--model "$(NAME)")

.PHONY: cache
cache: $(STAMP) ##- the models on this machine: versions, sizes, used by what, how old (EVICT=NAME, a digest, or unused)
	@scripts/cache.sh $(if $(EVICT),--evict "$(EVICT)")

.PHONY: check-vocab
check-vocab: $(STAMP) ##- one vocabulary in all models of the run (CONFIG= RECIPE=)
	@scripts/check_vocab.sh $(if $(CONFIG),--config "$(CONFIG)") $(if $(RECIPE),--recipe "$(RECIPE)")

.PHONY: publish-models
publish-models: $(STAMP) ## models to the bucket (FROM=dir NAMES= AS=datasets FORCE=1)
	@scripts/publish_models.sh --from "$(FROM)" $(if $(call set,AS),--as "$(AS)") $(if $(filter 1,$(FORCE)),--force) $(NAMES)

.PHONY: models
models: $(STAMP) ## what is published: files, bytes, digest
	@scripts/models.sh

.PHONY: verify-models
verify-models: $(STAMP) ##- every byte of what is published, or of synced models, against its manifest ([NAME=] [FROM=dir])
	@scripts/verify_models.sh $(if $(FROM),--from "$(FROM)") $(NAME) $(NAMES)

.PHONY: deploy
deploy: $(STAMP) ## dry run, build, push, submit, follow, report (ENV= ALGO=)
	@scripts/deploy.sh

.PHONY: build
build: $(STAMP) ##- the image of this revision (ENV=)
	@scripts/build.sh

.PHONY: push
push: $(STAMP) ##- the image to the registry; a token on standard input logs in (ENV=)
	@scripts/push.sh

.PHONY: submit
submit: $(STAMP) ##- one run of the pushed image, created once per name (ENV= ALGO= RESUME=1)
	@scripts/submit.sh

.PHONY: status
status: $(STAMP) ## how a run stands (RUN_ID=name or number; default: the newest)
	@scripts/status.sh

.PHONY: logs
logs: $(STAMP) ## its last lines (RUN_ID= TAIL=200 FOLLOW=1)
	@scripts/logs.sh

.PHONY: monitor
monitor: $(STAMP) ## one page of it, drawn again (RUN_ID= FOLLOW=1)
	@scripts/monitor_training.sh

.PHONY: report
report: $(STAMP) ## its completion report: page and Markdown (RUN_ID= NOTES=file)
	@scripts/report.sh

.PHONY: compare
compare: $(STAMP) ## runs side by side (RUNS="a b c")
	@scripts/report.sh --compare

.PHONY: stop
stop: $(STAMP) ## end it (RUN_ID=)
	@scripts/stop.sh

.PHONY: resume
resume: $(STAMP) ## a new run that goes on from its checkpoints (RUN_ID=)
	@scripts/resume.sh

.PHONY: watch
watch: $(STAMP) ## stay with it, and resume it when it was preempted (RUN_ID=)
	@scripts/watch.sh

.PHONY: mlflow
mlflow: $(STAMP) ##- the MLflow runs of a prefix in one local store, and its page ([FROM=s3://bucket/prefix] [NAME=] ENV=)
	@scripts/mlflow.sh

.PHONY: verify-checkpoint
verify-checkpoint: $(STAMP) ##- the restore drill: a run's newest checkpoint from the bucket, proved and read (RUN_ID= STEP=)
	@scripts/verify_checkpoint.sh

.PHONY: test
test: $(STAMP) ## pytest and bats, on one embedded bucket
	@scripts/test.sh

.PHONY: test-docs
test-docs: $(STAMP) ##- every command of README and guide, and whether it prints what they show
	@scripts/docs.sh

.PHONY: test-image
test-image: $(STAMP) ##- image, registry, submit, deploy on real parts; as root it installs and starts them
	@scripts/test_image.sh

.PHONY: acceptance
acceptance: $(STAMP) ## each criterion of the plan: bar, measured, state (ONLY=)
	@scripts/acceptance.sh

.PHONY: lint
lint: $(STAMP) ##- ruff, mypy, shellcheck, shfmt, rumdl, yamllint, mbake, hadolint, zizmor
	@scripts/lint.sh

.PHONY: format
format: $(STAMP) ##- rewrite what lint would only name
	@scripts/lint.sh --fix

.PHONY: soak
soak: $(STAMP) ##- long: kills at drawn moments, a day of a bucket, the tests that make test leaves out (ALGO= SEED= STAGES=)
	@scripts/soak.sh

.PHONY: study
study: $(STAMP) ##- long: planted truth, does the weight go where it belongs
	@scripts/study.sh

.PHONY: bench
bench: $(STAMP) ##- long: the loss and the algorithms against their peers
	@scripts/bench.sh

.PHONY: clean
clean: ##- remove build/ and the generated test models; .venv stays
	@scripts/clean.sh

# What is no target and no file.
.DEFAULT:
	$(error $@: no such target. rule: a target is a stage; \
	  next: $(foreach 1,$(call MEANT,$@,$(shell sed -nE 's/^([a-z-]+):.*##.*/\1/p' Makefile)),make $(1); all: )make help)
