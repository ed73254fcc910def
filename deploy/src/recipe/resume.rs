//! Which changes of a recipe a resumed run allows: those that its parameters do not depend on.

use super::Recipe;
use super::error::RecipeError;
use super::keys::{KEYS, OnResume};
use super::values::in_toml;

/// Whether a run started with `saved` may go on with `requested`. The table of keys says which may differ.
///
/// # Errors
/// Names the first key that may not, with both values.
pub(crate) fn check(saved: &Recipe, requested: &Recipe) -> Result<(), RecipeError> {
    let fixed = KEYS.iter().filter(|key| key.on_resume == OnResume::Fixed);
    for key in fixed {
        let values = [saved, requested].map(|recipe| recipe.values.find(key.path));
        if values[0] != values[1] {
            let [saved, asked] = values.map(|value| value.map_or("nothing".into(), in_toml));
            return Err(RecipeError::Changed {
                recipe: requested.name.clone(),
                key: key.path,
                saved,
                requested: asked,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn recipe(overrides: &[&str]) -> Recipe {
        let overrides: Vec<String> = overrides.iter().map(|set| set.to_string()).collect();
        Recipe::load("shakespeare-char-cpu", &overrides).unwrap()
    }

    #[test]
    fn what_the_parameters_do_not_depend_on_may_change() {
        let changed = recipe(&[
            "name=other",
            "data.input=elsewhere.txt",
            "sampling.prompts=[\"a\"]",
            "checkpoint.every_steps=3",
            "checkpoint.stop_after=5",
            "cluster.min_workers=2",
        ]);
        check(&recipe(&[]), &changed).unwrap();
    }

    #[test]
    fn all_else_may_not() {
        for set in [
            "seed=2",
            "model.dropout=0.1",
            "schedule.steps=9000",
            "batch.slots=8",
            "evaluation.every_steps=7",
            "cluster.exact=false",
        ] {
            let error = check(&recipe(&[]), &recipe(&[set])).unwrap_err();
            assert!(error.to_string().contains(set.split('=').next().unwrap()), "{error}");
        }
        let refused = |set| check(&recipe(&[]), &recipe(&[set])).unwrap_err().to_string();
        expect!["recipe shakespeare-char-cpu: optimizer.lr = 0.0005: the run to resume was started with 0.001, and this key may not change; leave it as it was, or start a new run in another directory"].assert_eq(&refused("optimizer.lr=0.0005"));
        expect![[r#"recipe shakespeare-char-cpu: schedule.decay = "constant": the run to resume was started with "cosine", and this key may not change; leave it as it was, or start a new run in another directory"#]].assert_eq(&refused("schedule.decay=constant"));
    }

    #[test]
    fn the_same_number_written_otherwise_is_no_change() {
        check(&recipe(&["optimizer.lr=1"]), &recipe(&["optimizer.lr=1.0"])).unwrap();
    }
}
