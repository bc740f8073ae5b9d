//! Inputs and outputs as people read them: long lists cut, and each call named by what it brought.

use serde::Serialize;
use serde_json::Value;

/// Items of a list that are shown before the rest is only counted.
const SHOWN: usize = 6;

/// Cuts long lists out of what `Debug` has printed: prompts and hashes are nobody's reading.
pub fn shorten(debug: &str) -> String {
    let mut out = String::with_capacity(debug.len());
    let mut rest = debug;
    while let Some(open) = rest.find('[') {
        let (before, list) = rest.split_at(open + 1);
        out.push_str(before);
        // A list of lists, or of structs with lists, is cut within its items.
        let Some(end) = list.find([']', '[']) else {
            rest = list;
            continue;
        };
        let items: Vec<&str> = list[..end].split(", ").collect();
        if list[end..].starts_with(']') && items.len() > SHOWN {
            out.push_str(&format!("{}, … {} more", items[..SHOWN].join(", "), items.len() - SHOWN));
        } else {
            out.push_str(&list[..end]);
        }
        rest = &list[end..];
    }
    out.push_str(rest);
    out
}

/// What an input is, by the names of its variants: `StepDone`, `Router Prefill`, `Message Offer`.
pub fn kind<I: Serialize>(input: &I) -> String {
    // An input that JSON cannot hold is still counted.
    let Ok(value) = serde_json::to_value(input) else { return "unnamed".into() };
    let mut names = Vec::new();
    let mut value = &value;
    loop {
        match value {
            Value::String(name) if is_variant(name) => names.push(name.as_str()),
            Value::Object(fields) => {
                let only = fields.iter().next().filter(|_| fields.len() == 1);
                if let Some((name, inner)) = only.filter(|(name, _)| is_variant(name)) {
                    names.push(name);
                    value = inner;
                    continue;
                }
                if let Some(message) = fields.get("message") {
                    value = message;
                    continue;
                }
            }
            _ => {}
        }
        return names.join(" ");
    }
}

fn is_variant(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase()) && name.chars().all(|c| c.is_ascii_alphanumeric())
}

/// Numbers of the requests that a `Debug` text names, in its order.
pub fn requests(debug: &str) -> impl Iterator<Item = u64> + '_ {
    debug.split("RequestId(").skip(1).filter_map(|rest| rest.split_once(')')?.0.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_decode_node::machine::DecodeInput;
    use ridge_kvtransfer::{ReceiverInput, SenderInput};
    use ridge_protocol::transfer::ReceiveEvent;
    use ridge_protocol::wire::{ReceiverMsg, RouterToNode, SenderMsg};
    use ridge_protocol::{Duration, NodeName, RequestId};
    use ridge_router::machine::{ClientId, RouterInput};

    #[test]
    fn long_lists_are_cut() {
        let check = |text: &str, want: &str| assert_eq!(shorten(text), want);
        check("Cancel { request: RequestId(9) }", "Cancel { request: RequestId(9) }");
        check("A { tokens: [1, 2, 3, 4, 5, 6] }", "A { tokens: [1, 2, 3, 4, 5, 6] }");
        check("A { t: [1, 2, 3, 4, 5, 6, 7, 8], n: 1 }", "A { t: [1, 2, 3, 4, 5, 6, … 2 more], n: 1 }");
        check("[[1, 2, 3, 4, 5, 6, 7], []]", "[[1, 2, 3, 4, 5, 6, … 1 more], []]");
        check("unclosed [1, 2", "unclosed [1, 2");
        check("", "");
    }

    #[test]
    fn inputs_are_named_by_their_variants() {
        let (from, request) = (NodeName("decode-0".into()), RequestId(9));
        assert_eq!(kind(&RouterInput::ClientGone(ClientId(3))), "ClientGone");
        assert_eq!(kind(&RouterInput::Drain), "Drain");
        assert_eq!(kind(&DecodeInput::Router(RouterToNode::Cancel { request })), "Router Cancel");
        let busy = Duration::ZERO;
        assert_eq!(kind(&DecodeInput::StepDone { step: 1, outputs: Vec::new(), busy }), "StepDone");
        let failed = ReceiveEvent::Failed { request, reason: "Lost".into() };
        assert_eq!(kind(&DecodeInput::Transfer(failed)), "Transfer Failed");
        assert_eq!(kind(&SenderInput::PeerUp(from.clone())), "PeerUp");
        let message = ReceiverMsg::Commit { request };
        assert_eq!(kind(&SenderInput::Message { from: from.clone(), message }), "Message Commit");
        let message = SenderMsg::Abort { request, reason: "x".into() };
        assert_eq!(kind(&ReceiverInput::Message { from, message }), "Message Abort");
    }

    #[test]
    fn requests_are_found_wherever_they_are() {
        let outputs = vec![(RequestId(7), 1), (RequestId(8), 2)];
        assert_eq!(requests(&format!("{outputs:?} {:?}", RequestId(u64::MAX))).collect::<Vec<_>>(), [7, 8, u64::MAX]);
        assert_eq!(requests("RequestId(x) RequestId(").count(), 0);
    }
}
