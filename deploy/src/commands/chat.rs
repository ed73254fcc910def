//! `lockstep chat`: a conversation with a model, at a terminal or line by line from a pipe.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;

use anyhow::Context as _;
use lockstep_model::inference::{Limits, Overflow, Request, Sampling, complete};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::open_model::OpenModel;
use super::{Caller, Usage};
use crate::chat::answer::{Answer, default_tokens};
use crate::chat::conversation::Conversation;
use crate::chat::line::{HELP, Line};
use crate::chat::template::{Template, today};
use crate::cli::Chat;
use crate::interrupt::Interrupt;
use crate::telemetry;

/// Talks until there is nothing more to be said.
pub(crate) fn run(args: &Chat) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let sampling = args.sampling.sampling()?;
    let model = OpenModel::load(&args.model, Limits { sequences: 1, ..Limits::default() }, Caller::Computes)?;
    let context = model.engine.context();
    let default_tokens = default_tokens(context);
    let answer_tokens = args.tokens.unwrap_or(default_tokens);
    if !(1..context).contains(&answer_tokens) {
        return Err(Usage(format!(
            "--tokens {answer_tokens}: must be at least 1, and leave room for what is said in the {context} tokens that the \
             model reads; for example {default_tokens}"
        ))
        .into());
    }
    let template = model.template()?;
    eprintln!("{}", template.describe());
    let conversation = Conversation::new(args.system.clone());
    Talk { model, template, conversation, sampling, answer_tokens, interrupt: Interrupt::listen()? }.go_on()
}

/// A conversation under way.
struct Talk {
    model: OpenModel,
    template: Template,
    conversation: Conversation,
    /// With the seed of the next answer, so that a question asked again is answered by other draws.
    sampling: Sampling,
    answer_tokens: usize,
    interrupt: Interrupt,
}

impl Talk {
    fn go_on(&mut self) -> anyhow::Result<()> {
        let mut lines = Lines::open()?;
        while let Some(line) = lines.next()? {
            match Line::of(&line) {
                Line::Nothing => {}
                Line::Say(text) => self.exchange(text)?,
                Line::Reset => self.conversation.reset(),
                Line::System(system) => self.conversation.set_system(system),
                Line::Save(path) => match save(&path, &self.conversation) {
                    Ok(()) => eprintln!("appended to {}", path.display()),
                    Err(error) => eprintln!("{}: cannot be written: {error}", path.display()),
                },
                Line::Help => eprintln!("{HELP}"),
                Line::Quit => break,
                Line::Unknown(why) => eprintln!("{why}"),
            }
        }
        Ok(())
    }

    /// Asks, and prints the answer as it comes. What cannot be asked is said, and is no part of the conversation.
    fn exchange(&mut self, text: String) -> anyhow::Result<()> {
        let context = self.model.engine.context();
        self.conversation.ask(text);
        match self.conversation.prompt(&self.template, today(), context - self.answer_tokens) {
            Ok((prompt, forgotten)) => {
                if forgotten > 0 {
                    eprintln!("(the model reads {context} tokens: the {forgotten} oldest turns are forgotten)");
                }
                let said = self.answer(prompt)?;
                self.conversation.answer(said.trim_end().into());
            }
            Err(error) => {
                self.conversation.take_back();
                eprintln!("{error}");
            }
        }
        Ok(())
    }

    /// Prints the answer to `prompt`, and returns it. Ctrl-C ends it early.
    fn answer(&mut self, prompt: Vec<u32>) -> anyhow::Result<String> {
        let request = Request {
            prompt,
            max_tokens: self.answer_tokens,
            sampling: self.sampling,
            ends: self.template.ends().to_vec(),
            overflow: Overflow::Stop,
        };
        self.sampling.seed = self.sampling.seed.wrapping_add(1);
        let mut answer = Answer::new(&self.model.tokenizer, self.template.stops().to_vec());
        let (mut out, mut said) = (io::stdout().lock(), String::new());
        let mut say = |text: &str| {
            said.push_str(text);
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        };
        let answering = self.interrupt.watch();
        let mut written = Ok(());
        complete(&mut self.model.engine, request, |token| {
            written = say(&answer.push(token));
            written.is_ok() && !answer.stopped() && !answering.interrupted()
        })?;
        let rest = answer.finish() + "\n";
        written.and_then(|()| say(&rest)).context("the answer cannot be written")?;
        Ok(said)
    }
}

/// What is typed, or comes through a pipe.
enum Lines {
    Terminal(Box<DefaultEditor>),
    Pipe(io::Lines<io::StdinLock<'static>>),
}

impl Lines {
    fn open() -> anyhow::Result<Self> {
        if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
            return Ok(Self::Pipe(io::stdin().lines()));
        }
        eprintln!("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends");
        Ok(Self::Terminal(Box::new(DefaultEditor::new().context("the terminal cannot be used")?)))
    }

    /// The next line; `None` at the end.
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        let editor = match self {
            Self::Pipe(lines) => return lines.next().transpose().context("standard input cannot be read"),
            Self::Terminal(editor) => editor,
        };
        loop {
            match editor.readline("› ") {
                Ok(line) => {
                    editor.add_history_entry(line.as_str()).context("the line cannot be kept")?;
                    return Ok(Some(line));
                }
                // Clears the line, as in a shell.
                Err(ReadlineError::Interrupted) => {}
                Err(ReadlineError::Eof) => return Ok(None),
                Err(error) => return Err(error).context("the terminal cannot be read"),
            }
        }
    }
}

fn save(path: &Path, conversation: &Conversation) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(conversation.to_json_line().as_bytes())
}
