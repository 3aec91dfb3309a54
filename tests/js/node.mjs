// node node.mjs MODELS < cases.json > answers.json
import { readFileSync } from "node:fs";
import * as transformers from "@huggingface/transformers";
import { answers } from "./answers.mjs";

const cases = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(await answers(transformers, process.argv[2], cases)));
