//! From a recipe to a run: the corpus is read and everything is put together.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use lockstep_coordinator::config::Turns;
use lockstep_coordinator::{RunConfig, run_dir};
use lockstep_model::checkpoint;
use lockstep_model::corpus::Corpus;
use lockstep_model::pairs::Reading;
use lockstep_model::sampler::{LineSource, Source, TokenSource, WeightedCorpus};
use lockstep_model::tokenizer::Tokenizer;

use super::{Usage, initial};
use crate::cli::RecipeArgs;
use crate::data::corpus;
use crate::data::preferences::{self, Preferences};
use crate::data::supervised::{self, Supervised};
use crate::recipe::{self, Recipe, Stage};

/// The recipe of a newcomer.
const DEFAULT_RECIPE: &str = "quickstart";

/// Reads the recipe that the command line names; where it names none, that of the run to resume, or the default.
pub(crate) fn recipe(args: &RecipeArgs, resumed: Option<&Path>) -> anyhow::Result<Recipe> {
    let own = resumed.filter(|run| run_dir::holds_run(run)).map(run_dir::recipe);
    let named = match (&args.recipe, own) {
        (Some(named), _) => named.clone(),
        (None, Some(own)) if own.exists() => own.display().to_string(),
        (None, Some(own)) => {
            return Err(Usage(format!(
                "{}: is not there, so the run does not know its recipe; name the one that it was started with",
                own.display()
            ))
            .into());
        }
        (None, None) => DEFAULT_RECIPE.into(),
    };
    match Recipe::init_of_unnamed_model(&named, &args.set)? {
        Some(init) => {
            let model =
                initial::model_overrides(&init).context("the recipe names no [model], so that it is that of init")?;
            Ok(Recipe::load(&named, &[model, args.set.clone()].concat())?)
        }
        None => Ok(Recipe::load(&named, &args.set)?),
    }
}

/// What a recipe is about once its corpus is read.
pub(crate) struct Data {
    /// Where batches come from.
    pub(crate) source: Source,
    /// How text becomes tokens.
    pub(crate) tokenizer: Option<Tokenizer>,
    /// Bytes of text for each validation token, on average; `None` where there is no text.
    pub(crate) bytes_per_token: Option<f64>,
    /// How a model that learns to answer is asked; `None` of others.
    pub(crate) turns: Option<Turns>,
    /// What was found where conversations are learned, for people.
    pub(crate) report: Option<String>,
}

impl Data {
    /// Distinct tokens; 0 where there is no text.
    pub(crate) fn vocab_size(&self) -> usize {
        self.tokenizer.as_ref().map_or(0, Tokenizer::vocab_size)
    }
}

/// Reads and tokenizes the recipe's corpus.
pub(crate) fn data(recipe: &Recipe) -> anyhow::Result<Data> {
    let (Some(context), Some(data)) = (recipe.model.context(), &recipe.data) else {
        let source = Source::Line(LineSource { batch: recipe.batch });
        return Ok(Data { source, tokenizer: None, bytes_per_token: None, turns: None, report: None });
    };
    let known = || recipe.init.as_deref().map(initial::tokenizer).transpose();
    let lessons = match data.stage {
        Stage::Pretrain => None,
        Stage::Sft => {
            let Supervised { source, tokenizer, turns, report } = supervised::load(recipe, data, context, known()?)?;
            Some((Source::Packed(source), tokenizer, turns, report.in_full()))
        }
        stage @ (Stage::Reward | Stage::Dpo) => {
            let reading = if stage == Stage::Reward { Reading::Score } else { Reading::LogProbability };
            let Preferences { source, tokenizer, turns, report } =
                preferences::load(recipe, data, context, known()?, reading)?;
            Some((Source::Pairs(source), tokenizer, turns, report.in_full()))
        }
    };
    if let Some((source, tokenizer, turns, report)) = lessons {
        recipe.check_vocabulary(tokenizer.vocab_size())?;
        let (turns, report) = (Some(turns), Some(report));
        return Ok(Data { source, tokenizer: Some(tokenizer), bytes_per_token: None, turns, report });
    }
    let corpora = corpus::load(data)?;
    for corpus in &corpora {
        recipe.check_corpus(corpus.tokenizer.vocab_size(), corpus.training.len(), corpus.validation.len())?;
    }
    let weights = data.inputs.iter().map(|input| input.weight);
    let bytes_per_token = bytes_per_token(corpora.iter().zip(weights.clone()));
    let tokenizer = corpora.first().map(|corpus| corpus.tokenizer.clone());
    let separator = recipe.separator(tokenizer.as_ref().and_then(Tokenizer::end_of_text))?;
    let weighted = |(Corpus { training, validation, .. }, weight)| WeightedCorpus { weight, training, validation };
    let source = TokenSource {
        corpora: corpora.into_iter().zip(weights).map(weighted).collect(),
        context,
        order: data.order,
        seed: recipe.seed,
        batch: recipe.batch,
        separator,
    };
    Ok(Data { source: Source::Tokens(source), tokenizer, bytes_per_token, turns: None, report: None })
}

/// Bytes of text for each validation token of a mixture, on average over what is drawn.
fn bytes_per_token<'a>(mixture: impl Iterator<Item = (&'a Corpus, f64)>) -> Option<f64> {
    let (mut bytes, mut total) = (0.0, 0.0);
    for (corpus, weight) in mixture {
        bytes += weight * corpus.validation_bytes_per_token()?;
        total += weight;
    }
    Some(bytes / total)
}

/// Everything a coordinator must know, and what to say of conversations that are learned. A resumed run's recipe may differ only where that does not change the run.
pub(crate) fn run_config(recipe: &Recipe, run: PathBuf, resume: bool) -> anyhow::Result<(RunConfig, Option<String>)> {
    let saved = if resume { check_resume(recipe, &run)? } else { None };
    let same_init = saved.is_some_and(|saved| saved.init == recipe.init);
    let recipe = &if same_init { on_own_base(recipe, &run) } else { recipe.clone() };
    let data = data(recipe)?;
    let model = recipe.model.with_vocabulary(data.vocab_size());
    let initial = match (&recipe.init, &data.tokenizer) {
        (Some(init), Some(tokenizer)) => Some(initial::read(init, &model, tokenizer)?),
        _ => None,
    };
    let config = RunConfig {
        recipe_name: recipe.name.clone(),
        recipe_toml: recipe.to_toml(),
        seed: recipe.seed,
        model,
        objective: recipe.objective,
        precision: recipe.precision,
        initial,
        adapters: recipe.adapters.clone(),
        tokenizer: data.tokenizer,
        bytes_per_token: data.bytes_per_token,
        source: Arc::new(data.source),
        optimizer: recipe.optimizer.clone(),
        outer: recipe.outer.clone(),
        keep_moments: recipe.keep_moments,
        skip: recipe.skip,
        schedule: recipe.schedule.clone(),
        batch: recipe.batch,
        compression: recipe.compression,
        evaluation: recipe.evaluation.clone(),
        sampling: recipe.sampling.clone(),
        turns: data.turns,
        checkpoint: recipe.checkpoint.clone(),
        cluster: recipe.cluster.clone(),
        run_dir: run,
        resume,
    };
    Ok((config, data.report))
}

/// The recipe of the run in `run`, which keeps the base of adapters, if it trains such: they do not depend on where it was.
pub(super) fn on_own_base(recipe: &Recipe, run: &Path) -> Recipe {
    let (base, mut recipe) = (run_dir::base(run), recipe.clone());
    if recipe.adapters.is_some() && base.exists() {
        recipe.init = Some(base);
    }
    recipe
}

/// Compares a recipe with that of the run's newest checkpoint, or, before there is one, with the run's own; this one.
fn check_resume(recipe: &Recipe, run: &Path) -> anyhow::Result<Option<Recipe>> {
    let own = run_dir::recipe(run);
    let saved = match checkpoint::newest_manifest(&run_dir::checkpoints(run))? {
        Some(manifest) => Recipe::from_toml(&manifest.recipe_name, &manifest.recipe, &[])?,
        None if own.exists() => Recipe::load(&own.display().to_string(), &[])?,
        None => return Ok(None),
    };
    recipe::resume::check(&saved, recipe)?;
    Ok(Some(saved))
}
