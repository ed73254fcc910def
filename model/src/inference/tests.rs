//! The engine against the network that trains, and against itself: alone and in company.

use std::collections::BTreeMap;

use super::network::{Cache, Network, Run};
use super::{Engine, Event, Finish, Limits, Overflow, Request, RequestError, Sampling, SequenceId, complete};
use crate::compute::Computer;
use crate::config::{Gelu, GptConfig, LineConfig, LlamaConfig, ModelConfig, RopeScaling};
use crate::device::{ComputeDevice, DeviceChoice};
use crate::kernels::KeyCache;
use crate::layout::{Layout, initial_parameters};
use crate::random::{Stream, normal};

const CONTEXT: usize = 96;

fn gpt(bias: bool, gelu: Gelu, width: usize) -> ModelConfig {
    ModelConfig::Gpt(GptConfig {
        vocab_size: 70,
        context: CONTEXT,
        layers: 2,
        heads: 4,
        width,
        bias,
        tied_head: !bias,
        score_head: false,
        gelu,
        norm_epsilon: 1e-5,
        dropout: 0.0,
    })
}

fn llama(kv_heads: usize, head_width: Option<usize>, qk_norm: bool, scaled: bool) -> ModelConfig {
    let scaling = RopeScaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 32.0 };
    ModelConfig::Llama(LlamaConfig {
        vocab_size: 65,
        context: CONTEXT,
        layers: 2,
        heads: 6,
        kv_heads,
        width: 48,
        head_width,
        ffn_width: 100,
        qk_norm,
        tied_head: qk_norm,
        score_head: false,
        rope_theta: 10_000.0,
        rope_scaling: scaled.then_some(scaling),
        norm_epsilon: 1e-5,
        dropout: 0.0,
    })
}

fn models() -> Vec<ModelConfig> {
    vec![
        gpt(true, Gelu::Exact, 64),
        gpt(false, Gelu::Tanh, 40),
        llama(6, None, false, false),
        llama(2, Some(18), true, true),
        llama(1, Some(80), false, true),
    ]
}

/// Larger than what training starts from, so that nothing is near 0.
fn parameters(model: &ModelConfig) -> Vec<f32> {
    let mut parameters = initial_parameters(model, 1);
    let mut noise = vec![0.0; parameters.len()];
    normal(4, Stream::Initialisation, 99, 0.15, &mut noise);
    parameters.iter_mut().zip(noise).for_each(|(parameter, noise)| *parameter += noise);
    parameters
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 8).map(|i| i % 65).collect()
}

fn cpu() -> ComputeDevice {
    ComputeDevice::open(DeviceChoice::Cpu).unwrap()
}

fn engine(model: &ModelConfig, limits: Limits) -> Engine {
    Engine::new(model, &parameters(model), &cpu(), limits).unwrap()
}

fn request(prompt: &[u32], max_tokens: usize, seed: u64) -> Request {
    let sampling = Sampling { seed, ..Sampling::default() };
    Request { prompt: prompt.to_vec(), max_tokens, sampling, ends: Vec::new(), overflow: Overflow::Stop }
}

/// Takes steps until nothing is under way; what each sequence got.
fn finish(engine: &mut Engine) -> BTreeMap<SequenceId, Vec<u32>> {
    let mut found = BTreeMap::<_, Vec<u32>>::new();
    while engine.running() > 0 {
        for Event { sequence, token, .. } in engine.step().unwrap() {
            found.entry(sequence).or_default().extend(token);
        }
    }
    found
}

fn alone(engine: &mut Engine, request: Request) -> Vec<u32> {
    let mut found = Vec::new();
    complete(engine, request, |token| {
        found.push(token);
        true
    })
    .unwrap();
    found
}

#[test]
fn logits_are_those_of_the_network_that_trains() {
    for model in models() {
        let parameters = parameters(&model);
        let mut computer = Computer::new(&model, &cpu());
        computer.load(&parameters).unwrap();
        let mut network = Network::new(&model, &parameters).unwrap();
        for length in [1, 2, 17, 66, CONTEXT] {
            let tokens = tokens(length);
            let run = Run { place: 0, tokens: &tokens, start: 0, wants_logits: true };
            let cache = network.cache();
            let found = network.forward(&[run], &mut [cache]).remove(0);
            let expected = computer.next_token_logits(&tokens).unwrap();
            let largest = expected.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(largest > 0.5 && worst < 2e-5 * largest.max(1.0), "{model:?}, {length}: {worst} of {largest}");
        }
    }
}

#[test]
fn what_a_device_has_cached_serves_the_tokens_that_follow() {
    for model in models() {
        let mut computer = Computer::new(&model, &cpu());
        computer.load(&parameters(&model)).unwrap();
        let (tokens, mut cache) = (tokens(CONTEXT), KeyCache::default());
        for end in [1, 2, 30, 31, 60] {
            let start = cache.len();
            let found = computer.next_token_logits_after(&mut cache, &tokens[start..end]).unwrap();
            let expected = computer.next_token_logits(&tokens[..end]).unwrap();
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(cache.len() == end && worst < 1e-4, "{model:?}, {end}: {worst}");
        }
        let mut copy = cache.clone();
        copy.truncate(25);
        let again = computer.next_token_logits_after(&mut copy, &tokens[25..60]).unwrap();
        let expected = computer.next_token_logits(&tokens[..60]).unwrap();
        assert!(again.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4), "{model:?}");
        assert_eq!((copy.len(), cache.len()), (60, 60));
        assert!(computer.next_token_logits_after(&mut cache, &tokens[..CONTEXT - 59]).is_err(), "beyond the context");
        assert!(cache.is_empty());
    }
}

/// The logits after every token, read in parts of these sizes by turns.
fn in_parts(network: &mut Network, cache: &mut [Cache], tokens: &[u32], sizes: &[usize]) -> BTreeMap<usize, Vec<f32>> {
    let mut found = BTreeMap::new();
    let (mut start, mut sizes) = (0, sizes.iter().cycle());
    while start < tokens.len() {
        let end = tokens.len().min(start + sizes.next().unwrap());
        let run = Run { place: 0, tokens: &tokens[start..end], start, wants_logits: true };
        found.insert(end, network.forward(&[run], cache).remove(0));
        start = end;
    }
    found
}

#[test]
fn how_a_text_is_cut_and_how_many_threads_there_are_does_not_show() {
    for model in models() {
        let mut network = Network::new(&model, &parameters(&model)).unwrap();
        let tokens = tokens(CONTEXT);
        let mut read = |sizes: &[usize], threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let cache = network.cache();
            pool.install(|| in_parts(&mut network, &mut [cache], &tokens, sizes))
        };
        let one_by_one = read(&[1], 1);
        for (sizes, threads) in [(vec![CONTEXT], 3), (vec![5, 1, 12, 31], 2), (vec![64, 7], 1)] {
            for (length, logits) in read(&sizes, threads) {
                assert_eq!(logits, one_by_one[&length], "{model:?}, {sizes:?}, {length}");
            }
        }
    }
}

#[test]
fn a_sequence_gets_the_same_alone_and_in_company() {
    let model = llama(2, None, true, false);
    let all = tokens(60);
    let requests: Vec<Request> =
        (0..7).map(|i| request(&all[i * 3..i * 3 + 1 + i * 5], 12 + i, 100 + i as u64)).collect();
    let mut together = engine(&model, Limits { sequences: 7, prefill_tokens: 20 });
    let mut ids = Vec::new();
    for request in &requests {
        ids.push(together.admit(request.clone()).unwrap());
        together.step().unwrap();
    }
    // What came in the steps above is not in here; ends are.
    let found = finish(&mut together);
    for (request, id) in requests.into_iter().zip(ids) {
        let alone = alone(&mut engine(&model, Limits::default()), request);
        assert!(alone.ends_with(&found[&id]) && !found[&id].is_empty(), "{:?} of {alone:?}", found[&id]);
    }
}

#[test]
fn what_sequences_share_is_read_once_and_changes_nothing() {
    let model = gpt(true, Gelu::Exact, 64);
    let prompt = tokens(50);
    let expected = alone(&mut engine(&model, Limits::default()), request(&prompt, 20, 5));

    let mut engine = engine(&model, Limits { sequences: 2, prefill_tokens: 30 });
    let first = engine.admit(request(&prompt, 20, 5)).unwrap();
    let second = engine.admit(request(&prompt, 20, 5)).unwrap();
    assert_eq!(engine.plan(), [30, 0], "the second waits for what the first reads");
    let found = finish(&mut engine);
    assert_eq!((&found[&first], &found[&second]), (&expected, &expected));

    // The next turn of the conversation.
    let longer = [&prompt[..], &expected, &[1, 2]].concat();
    let third = engine.admit(request(&longer, 5, 5)).unwrap();
    assert_eq!(engine.plan().iter().sum::<usize>(), 3, "the answer's last token was never read");
    let found = finish(&mut engine);
    assert_eq!(found[&third], alone(&mut self::engine(&model, Limits::default()), request(&longer, 5, 5)));
}

#[test]
fn a_full_context_ends_a_sequence_or_makes_it_forget() {
    let model = llama(2, None, false, false);
    let mut engine = engine(&model, Limits::default());
    let prompt = tokens(CONTEXT - 3);
    let stopped = alone(&mut engine, request(&prompt, 1000, 1));
    assert_eq!(stopped.len(), 4, "three are read, and the fourth is not");
    let slid = alone(&mut engine, Request { overflow: Overflow::Slide, ..request(&prompt, 200, 1) });
    assert_eq!((slid.len(), &slid[..4]), (200, &stopped[..]));
    let all = [&prompt[..], &slid[..4]].concat();
    let half = &all[all.len() - CONTEXT / 2..];
    let greedy = |prompt: &[u32]| Request { sampling: Sampling::greedy(), ..request(prompt, 10, 1) };
    let slides = |prompt: &[u32]| Request { overflow: Overflow::Slide, ..greedy(prompt) };
    assert_eq!(alone(&mut engine, slides(&prompt))[..4], alone(&mut engine, greedy(&prompt))[..]);
    let long = [&prompt[..], half].concat();
    let last = alone(&mut engine, slides(&long));
    assert_eq!(last[..1], alone(&mut engine, greedy(&long[long.len() - CONTEXT..]))[..1], "the end of a long prompt");
}

#[test]
fn an_end_is_not_given_out() {
    let model = gpt(false, Gelu::Tanh, 40);
    let all = alone(&mut engine(&model, Limits::default()), request(&[1], 40, 3));
    let end = all[20];
    let before = all.iter().position(|&token| token == end).unwrap();
    let mut engine = engine(&model, Limits::default());
    engine.admit(Request { ends: vec![end], ..request(&[1], 40, 3) }).unwrap();
    let mut events = Vec::new();
    while engine.running() > 0 {
        events.extend(engine.step().unwrap());
    }
    let last = events.pop().unwrap();
    assert_eq!((last.token, last.finish), (None, Some(Finish::End)));
    assert!(events.iter().all(|event| event.finish.is_none()));
    assert_eq!(events.iter().map(|event| event.token.unwrap()).collect::<Vec<_>>(), all[..before]);
}

#[test]
fn a_cancelled_sequence_makes_room() {
    let model = gpt(true, Gelu::Exact, 64);
    let mut engine = engine(&model, Limits { sequences: 1, ..Limits::default() });
    let first = engine.admit(request(&[1, 2], 50, 1)).unwrap();
    engine.step().unwrap();
    assert_eq!(engine.admit(request(&[1, 2], 50, 1)), Err(RequestError::Full(1)));
    assert!(engine.cancel(first) && !engine.cancel(first));
    assert_eq!((engine.running(), engine.step().unwrap()), (0, Vec::new()));
    assert_eq!(alone(&mut engine, request(&[1, 2], 5, 2)).len(), 5);
    assert_eq!(alone(&mut engine, request(&[1, 2], 0, 2)).len(), 0);
}

#[test]
fn a_request_that_makes_no_sense_is_refused() {
    let model = gpt(true, Gelu::Exact, 64);
    let mut engine = engine(&model, Limits::default());
    assert_eq!(engine.admit(request(&[], 5, 1)), Err(RequestError::Empty));
    let too_long = RequestError::TooLong { tokens: CONTEXT + 1, context: CONTEXT };
    assert_eq!(engine.admit(request(&tokens(CONTEXT + 1), 5, 1)), Err(too_long));
    assert_eq!(engine.admit(request(&[3, 70], 5, 1)), Err(RequestError::Token { token: 70, vocab_size: 70 }));
    let nonsense = Request { sampling: Sampling { top_p: 2.0, ..Sampling::default() }, ..request(&[1], 5, 1) };
    assert!(matches!(engine.admit(nonsense), Err(RequestError::Sampling(_))));
    assert_eq!(engine.running(), 0);

    let line = ModelConfig::Line(LineConfig { weight: 1.0, bias: 0.0 });
    assert!(Engine::new(&line, &[1.0, 0.0], &cpu(), Limits::default()).is_err());
    let short = vec![0.0; Layout::of(&model).len() - 1];
    assert!(Engine::new(&model, &short, &cpu(), Limits::default()).is_err());
}

/// What is hashed to show that generation changes nothing is what is computed with.
#[test]
fn parameters_are_read_back_as_they_are_in_memory() {
    let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
    for model in models() {
        let parameters = initial_parameters(&model, 3);
        let mut engine = Engine::new(&model, &parameters, &device, Limits::default()).unwrap();
        assert!(engine.parameters().unwrap() == parameters, "{model:?}");
        let request = Request {
            prompt: vec![1, 2, 3],
            max_tokens: 20,
            sampling: Sampling::default(),
            ends: Vec::new(),
            overflow: Overflow::Stop,
        };
        complete(&mut engine, request, |_| true).unwrap();
        assert!(engine.parameters().unwrap() == parameters, "{model:?}");
        let mut computer = Computer::new(&model, &device);
        computer.load(&parameters).unwrap();
        assert!(computer.parameters().unwrap() == parameters, "{model:?}");
    }
}
