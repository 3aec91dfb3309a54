// Returns what transformers.js answers to each case {model, dtype, device, task, inputs, options}, and the ids it reads.
export async function answers({ pipeline, env }, models, cases) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = models;
  const results = [];
  for (const { model, dtype, device, task, inputs, options } of cases) {
    const run = await pipeline(task, model, { dtype, device });
    const ids = run.tokenizer(inputs[0]).input_ids.tolist().flat().map(Number);
    const output = await run(...inputs, options);
    results.push({ ids, output: task === "feature-extraction" ? Array.from(output.data) : output });
    await run.dispose();
  }
  return results;
}
