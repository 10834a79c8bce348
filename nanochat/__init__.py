"""nanochat as a library: train, measure and serve a small chat model.

The storeys of docs/architecture.md, lowest first; a module imports only from its own storey and those below it:

- ground: common, heartbeat, ranks, files, runs, settings (device, processes, paths, flags)
- model: gpt, layers, flash_attention, cross_entropy, optim, updates, scaling, schedules
- data: dataset, document_files, tokenizer, lanes, dataloader, conversation_loader
- results: checkpoint_manager, checkpoint_writer, metrics
- generation: engine, scheduler, sequence, runner, kv_cache, sampling, tools
- evaluation: loss_eval, core_eval, chat_eval, scores, execution
- training: training_flags, stage, same_run, trainer, passes, rl
- what people see: server, openai_api, service, streams, runs_api, report
"""
