//! Whoever was admitted hears of the end, even if its control stream is opened after it.

use lockstep_proto::v1::coordinator_message::Kind;
use lockstep_proto::v1::lockstep_client::LockstepClient;
use lockstep_proto::v1::{self, admit_reply};
use lockstep_proto::{INCARNATION_KEY, PROTOCOL_VERSION, RUN_ID_KEY, WORKER_ID_KEY};
use tokio::runtime::Runtime;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::cluster::{SMALL, coordinator, relay, worker};

/// A member by its calls alone, up to its admission.
struct Admitted {
    runtime: Runtime,
    client: LockstepClient<Channel>,
    invitation: v1::Invitation,
    worker: u64,
}

impl Admitted {
    fn at(address: &str) -> Self {
        let runtime = Runtime::new().unwrap();
        let (client, invitation, verdict) = runtime.block_on(async {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            let mut client = LockstepClient::new(endpoint.connect().await.unwrap());
            let (protocol_version, name, device) = (PROTOCOL_VERSION, "late", "none");
            let request = v1::JoinRequest { protocol_version, name: name.into(), device: device.into() };
            let invitation = client.join(request).await.unwrap().into_inner();
            let request = v1::AdmitRequest {
                run_id: invitation.run_id.clone(),
                incarnation: invitation.incarnation,
                protocol_version,
                name: name.into(),
                device: device.into(),
                probe_sha256: vec![7; 32],
                workers: 1,
            };
            let reply = client.admit(request).await.unwrap().into_inner();
            (client, invitation, reply.verdict)
        });
        let Some(admit_reply::Verdict::WorkerId(worker)) = verdict else { panic!("not admitted: {verdict:?}") };
        Self { runtime, client, invitation, worker }
    }

    /// Opens the control stream, and returns all that comes.
    fn hear(&mut self) -> Vec<Kind> {
        let mut request = Request::new(tokio_stream::pending());
        request.metadata_mut().insert(WORKER_ID_KEY, self.worker.into());
        request.metadata_mut().insert(INCARNATION_KEY, self.invitation.incarnation.into());
        request.metadata_mut().insert(RUN_ID_KEY, self.invitation.run_id.parse().unwrap());
        self.runtime.block_on(async {
            let mut messages = self.client.control(request).await.unwrap().into_inner();
            let mut heard = Vec::new();
            while let Some(message) = messages.message().await.unwrap() {
                heard.extend(message.kind);
            }
            heard
        })
    }
}

fn is_release(heard: &[Kind]) -> bool {
    matches!(heard, [Kind::Release(v1::Release { run_goes_on: false, .. })])
}

#[test]
fn a_run_that_stops_tells_who_opens_its_stream_late() {
    let dir = tempfile::tempdir().unwrap();
    let (mut coordinator, address) = coordinator("quickstart", &dir.path().join("run"), &[], SMALL);
    let mut late = Admitted::at(&address);
    coordinator.signal("INT");
    coordinator.wait_for("release worker 1");
    let heard = late.hear();
    assert!(is_release(&heard), "{heard:?}");
    drop(late);
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
}

/// What its worker does not compute, another one of the run does.
#[test]
fn so_does_a_relay_that_is_released() {
    let dir = tempfile::tempdir().unwrap();
    let more = ["cluster.exact=false", "cluster.liveness_timeout_ms=60000", "schedule.steps=100000"];
    let (mut coordinator, address) =
        coordinator("quickstart", &dir.path().join("run"), &[], &[SMALL, &more[..]].concat());
    let mut other = worker(&address, "other");
    coordinator.wait_for("step 8: validation loss");
    let (mut relay, below) = relay(&address, "relay", &[]);
    let mut late = Admitted::at(&below);
    relay.wait_for("worker 2 of run");
    coordinator.signal("INT");
    relay.wait_for("released: ");
    let heard = late.hear();
    assert!(is_release(&heard), "{heard:?}");
    drop(late);
    assert_eq!([coordinator.wait(), relay.wait(), other.wait()], [Some(0); 3], "{}{}", coordinator.said, relay.said);
}
