//! Messages to text, by the Jinja template that comes with a chat model, as `transformers` renders it.
//!
//! `transformers` trims blocks, knows loop controls and `raise_exception`, and gives a template the names of special tokens;
//! templates use methods of Python's texts and lists, which `minijinja-contrib` has. What is only for training
//! (`{% generation %}`) marks text and does not change it.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; whatever the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A day, for templates that tell the model which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Day {
    /// e.g. 2026.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
}

/// A template that cannot be read, or refuses the messages.
#[derive(Debug, thiserror::Error)]
#[error("the chat template {problem}")]
pub struct ChatTemplateError {
    /// What is wrong.
    problem: String,
}

/// A chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate(Environment<'static>);

const NAME: &str = "chat";

impl ChatTemplate {
    /// Reads a template.
    ///
    /// # Errors
    /// If it is no Jinja.
    pub fn new(source: &str) -> Result<Self, ChatTemplateError> {
        let mut environment = Environment::new();
        let unreadable = |error: Error| ChatTemplateError { problem: format!("cannot be read: {error}") };
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(unreadable)?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, without_generation_marks(source)).map_err(unreadable)?;
        Ok(Self(environment))
    }

    /// The text of a conversation, with what begins an answer where `add_generation_prompt` is true. `special` are names of
    /// special tokens by their part, such as `bos_token`; `today` is what `strftime_now` knows.
    ///
    /// # Errors
    /// If the template refuses the messages, or asks for what there is not.
    pub fn render(
        &self,
        messages: &[Message],
        special: &BTreeMap<String, String>,
        add_generation_prompt: bool,
        today: Day,
    ) -> Result<String, ChatTemplateError> {
        let failed = |error: Error| {
            let problem = match error.kind() {
                ErrorKind::InvalidOperation => error.detail().unwrap_or("cannot be rendered").to_string(),
                _ => error.to_string(),
            };
            ChatTemplateError { problem: format!("refuses the messages: {problem}") }
        };
        let mut context: BTreeMap<String, Value> =
            special.iter().map(|(name, token)| (name.clone(), token.as_str().into())).collect();
        context.insert("messages".into(), Value::from(Serde(messages)));
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        // Given by `transformers`, too, and empty where there are none.
        context.insert("tools".into(), ().into());
        context.insert("documents".into(), ().into());
        let clock = move |format: &str| formatted(today, format);
        context.insert("strftime_now".into(), Value::from_function(clock));
        self.0.get_template(NAME).and_then(|template| template.render(context)).map_err(failed)
    }
}

fn raise_exception(message: &str) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
}

/// Python's `json.dumps` without its escapes of what is not ASCII; `indent` as there.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let json =
        serde_json::to_value(value).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = String::new();
    write_json(&json, indent, 0, &mut text);
    Ok(text)
}

/// Writes with Python's separators: `", "` and `": "`, and with an indent, lines.
fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, text: &mut String) {
    let (open, close, items): (char, char, Vec<(Option<&String>, &serde_json::Value)>) = match value {
        serde_json::Value::Array(items) => ('[', ']', items.iter().map(|item| (None, item)).collect()),
        serde_json::Value::Object(items) => ('{', '}', items.iter().map(|(key, item)| (Some(key), item)).collect()),
        scalar => return text.push_str(&scalar.to_string()),
    };
    let line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    text.push(open);
    for (index, (key, item)) in items.iter().enumerate() {
        if index > 0 {
            text.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(text, depth + 1);
        if let Some(key) = key {
            text.push_str(&serde_json::Value::from(key.as_str()).to_string());
            text.push_str(": ");
        }
        write_json(item, indent, depth + 1, text);
    }
    if !items.is_empty() {
        line(text, depth);
    }
    text.push(close);
}

/// A day by Python's format, as far as it names days, months and years.
fn formatted(Day { year, month, day }: Day, format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let name = MONTHS[usize::from(month.clamp(1, 12)) - 1];
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        match (character, if character == '%' { characters.next() } else { None }) {
            ('%', Some('Y')) => text.push_str(&year.to_string()),
            ('%', Some('m')) => text.push_str(&format!("{month:02}")),
            ('%', Some('d')) => text.push_str(&format!("{day:02}")),
            ('%', Some('B')) => text.push_str(name),
            ('%', Some('b')) => text.push_str(&name[..3]),
            ('%', Some('%')) => text.push('%'),
            ('%', other) => {
                let what = format!("strftime_now knows %Y, %m, %d, %B and %b, and not %{}", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
            (plain, _) => text.push(plain),
        }
    }
    Ok(text)
}

/// `{% generation %}` and its end as blocks that do nothing.
fn without_generation_marks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (before, tag) = (&rest[..start], &rest[start..start + length + 2]);
        text.push_str(before);
        match tag.trim_matches(['{', '}', '%', '-', '+']).trim() {
            "generation" => text.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => text.push_str(&tag.replace("endgeneration", "endif")),
            _ => text.push_str(tag),
        }
        rest = &rest[start + length + 2..];
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Day = Day { year: 2026, month: 3, day: 7 };

    fn render(template: &str, add_generation_prompt: bool) -> Result<String, String> {
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let messages = [message("user", " <Hi> & \"you\" "), message("assistant", "Hello")];
        let special = [("eos_token".to_string(), "</s>".to_string())].into();
        let template = ChatTemplate::new(template).map_err(|error| error.to_string())?;
        template.render(&messages, &special, add_generation_prompt, DAY).map_err(|error| error.to_string())
    }

    #[test]
    fn messages_are_written_as_they_are() {
        const CHATML: &str = "{% for message in messages %}
    {{ '<|im_start|>' + message['role'] + '\\n' + message.content.strip() + '<|im_end|>' }}
    {% generation %}
{{ eos_token }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt and not tools %}<|im_start|>assistant
{% endif %}";
        let text =
            "    <|im_start|>user\n<Hi> & \"you\"<|im_end|>\n</s>\n    <|im_start|>assistant\nHello<|im_end|>\n</s>\n";
        assert_eq!(render(CHATML, false).unwrap(), text);
        assert_eq!(render(CHATML, true).unwrap(), format!("{text}<|im_start|>assistant\n"));
    }

    #[test]
    fn loops_may_be_left_and_the_day_is_known() {
        let template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role }}{% break %}{% endfor %}";
        assert_eq!(render(template, false).unwrap(), "07 Mar 2026user");
        assert!(render("{{ strftime_now('%H') }}", false).unwrap_err().contains("%H"));
    }

    #[test]
    fn json_is_pythons() {
        let template = "{{ {'a': [1, 'é<'], 'b': {}} | tojson }}";
        assert_eq!(render(template, false).unwrap(), r#"{"a": [1, "é<"], "b": {}}"#);
        assert_eq!(render("{{ [1, [2]] | tojson(indent=2) }}", false).unwrap(), "[\n  1,\n  [\n    2\n  ]\n]");
    }

    #[test]
    fn a_refusal_is_told_in_the_templates_words() {
        let said = render("{{ raise_exception('roles must alternate') }}", false).unwrap_err();
        assert_eq!(said, "the chat template refuses the messages: roles must alternate");
        assert!(render("{% if %}", false).unwrap_err().starts_with("the chat template cannot be read: "));
    }
}
